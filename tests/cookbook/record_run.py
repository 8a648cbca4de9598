"""Runs a recipe module unmodified and records what it trained on: every forward_backward's datums and logprobs.

    python record_run.py OUT.json MODULE [recipe arguments]
"""

import json
import runpy
import sys

import tinker

CALLS = []


def _tensor(value):
    return value.to_numpy().tolist()


def _record(data, loss_fn, result):
    CALLS.append({
        "loss_fn": loss_fn,
        "metrics": result.metrics,
        "datums": [{"tokens": datum.model_input.to_ints(),
                    "inputs": {name: _tensor(value) for name, value in datum.loss_fn_inputs.items()},
                    "logprobs": _tensor(output["logprobs"])}
                   for datum, output in zip(data, result.loss_fn_outputs)]})


class _RecordedFuture:
    """The SDK's future, with the result noted when the recipe asks for it."""

    def __init__(self, future, data, loss_fn):
        self._future, self._data, self._loss_fn = future, data, loss_fn

    def _note(self, result):
        if self._data is not None:
            _record(self._data, self._loss_fn, result)
            self._data = None
        return result

    def result(self, *args, **kwargs):
        return self._note(self._future.result(*args, **kwargs))

    async def result_async(self, *args, **kwargs):
        return self._note(await self._future.result_async(*args, **kwargs))

    def __await__(self):
        return self.result_async().__await__()


def _install():
    client = tinker.TrainingClient
    plain, plain_async = client.forward_backward, client.forward_backward_async

    def forward_backward(self, data, loss_fn, *args, **kwargs):
        return _RecordedFuture(plain(self, data, loss_fn, *args, **kwargs), data, loss_fn)

    async def forward_backward_async(self, data, loss_fn, *args, **kwargs):
        return _RecordedFuture(await plain_async(self, data, loss_fn, *args, **kwargs), data, loss_fn)

    client.forward_backward, client.forward_backward_async = forward_backward, forward_backward_async


def main():
    out, module = sys.argv[1], sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    _install()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        with open(out, "w") as file:
            json.dump(CALLS, file)


if __name__ == "__main__":
    main()
