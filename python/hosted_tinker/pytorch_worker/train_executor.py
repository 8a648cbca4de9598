"""The training lane: its requests, the adapters that they change, and the results on their way."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from hosted_tinker.pytorch_worker import adapter_files, lora, protocol, trainer
from hosted_tinker.pytorch_worker.backend_config import BackendConfig
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError, WorkerError
from hosted_tinker.pytorch_worker.train_queue import Item, Plan, TrainQueue
from hosted_tinker.pytorch_worker.versions import Versions


@dataclasses.dataclass
class _Running:
    """A forward or forward_backward on its way. Its gradient joins the adapter's at the end: a failure changes
    nothing."""

    request: object
    batch: trainer.Batch
    logprobs: np.ndarray
    grad: torch.Tensor | None = None
    loss: float = 0.0
    seconds: float = 0.0


class TrainExecutor:
    def __init__(
        self, model: BaseModel, versions: Versions, config: BackendConfig, max_seq_len: int, adapter_bytes: int, send
    ):
        self._model, self._versions, self._send = model, versions, send
        self._max_seq_len = max_seq_len
        self._queue = TrainQueue(config.micro_batch_tokens, one_by_one=not model.pads)
        self._running: dict[int, _Running] = {}
        self._adapters: dict[str, lora.Adapter] = {}
        self._last_request: dict[str, int] = {}  # of live adapters
        self.adapter_bytes_limit = adapter_bytes
        self.micro_batches = self.tokens = 0

    # ---- requests

    def push(self, request) -> None:
        kind = request.WhichOneof("body")
        body = getattr(request, kind)
        if kind == "forward_backward":
            self._push_batch(request.id, body)
        elif kind == "replay":
            self._queue.set_replay(body.micro_batches)
            self._send(protocol.done(request.id, protocol.Ack()))
        else:
            op = {
                "create_adapter": self._create,
                "drop_adapter": self._drop,
                "optim_step": self._step,
                "save_adapter": self._save,
                "load_adapter": self._load,
                "publish_version": self._publish,
            }[kind]
            self._queue.push(Item(request.id, body.adapter, run=lambda: op(body)))

    def _push_batch(self, request_id: int, request) -> None:
        try:
            batch = trainer.Batch(request.batch, request.loss, self._model.vocab_size, self._max_seq_len)
        except WorkerError as error:
            # It fails when its turn comes: an adapter's answers keep the order of its requests.
            self._queue.push(Item(request_id, request.adapter, run=_raiser(error)))
            return
        self._running[request_id] = _Running(request, batch, np.zeros(len(batch.targets), np.float32))
        self._queue.push(Item(request_id, request.adapter, lengths=tuple(int(n) for n in batch.lengths)))

    def ready(self) -> bool:
        try:
            return self._queue.ready()
        except WorkerError as error:
            print(f"{error}; the rest is composed anew", flush=True)
            self._queue.clear_replay()
            return self._queue.ready()

    def run_slice(self) -> None:
        """One op or one micro-batch."""
        plan = self._queue.next() if self.ready() else None
        if plan is None:
            return
        if plan.op is not None:
            self._run_op(plan.op)
        else:
            self._run_micro_batch(plan)

    def queued(self) -> int:
        return len(self._queue)

    def adapter_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values())

    # ---- micro-batches

    def _run_micro_batch(self, plan: Plan) -> None:
        record = protocol.MicroBatch(number=plan.number)
        for part in plan.slices:
            record.slices.add(request=part.item.id, datum_begin=part.begin, datum_end=part.end)
        reply = protocol.Reply()
        reply.micro_batch_executed.CopyFrom(record)
        failures = {}
        for part in plan.slices:
            if part.item.id in failures:
                continue
            try:
                self._run_datums(part.item, range(part.begin, part.end))
            except Exception as error:  # out of memory, whatever a model throws: the request's failure alone
                failures[part.item.id] = (part.item, error)
        self.micro_batches += 1
        self._send(reply)
        for item, error in failures.values():
            self._queue.fail(item)
            self._running.pop(item.id, None)
            self._fail(item, error)
        for part in plan.slices:
            if part.item.id in self._running and part.end == len(part.item.lengths):
                self._finish(part.item)

    def _run_datums(self, item: Item, datums: range) -> None:
        running, adapter = self._running[item.id], self._adapter(item.adapter)
        if running.grad is None and not running.request.forward_only:
            running.grad = torch.zeros_like(adapter.grad)
        start = time.monotonic()
        logprobs, loss = trainer.run(self._model, adapter, running.request, running.batch, datums, running.grad)
        running.seconds += time.monotonic() - start
        begin, end = running.batch.target_offsets[datums.start], running.batch.target_offsets[datums.stop]
        running.logprobs[begin:end] = logprobs
        running.loss += loss
        self.tokens += int(running.batch.lengths[datums.start : datums.stop].sum())

    def _finish(self, item: Item) -> None:
        running = self._running.pop(item.id)
        if running.grad is not None:
            self._adapter(item.adapter).grad += running.grad
        tokens = float(len(running.batch.tokens))
        result = protocol.TrainResult(
            logprobs=protocol.to_bytes(running.logprobs, "<f4"), compute_seconds=running.seconds
        )
        result.metrics["loss:sum"] = running.loss
        result.metrics["num_tokens:sum"] = tokens
        result.metrics["compute_seconds:sum"] = running.seconds
        result.metrics["tokens_per_second:mean"] = tokens / running.seconds if running.seconds > 0 else 0.0
        self._done(item, result)

    # ---- ops

    def _run_op(self, item: Item) -> None:
        try:
            body = item.run()
        except Exception as error:
            self._fail(item, error)
        else:
            self._done(item, body)

    def _done(self, item: Item, body) -> None:
        if item.adapter in self._adapters:
            self._last_request[item.adapter] = item.id
        else:
            self._last_request.pop(item.adapter, None)
        self._send(protocol.done(item.id, body))

    def _fail(self, item: Item, error: Exception) -> None:
        if item.adapter in self._adapters:
            self._last_request[item.adapter] = item.id
        self._send(protocol.failed(item.id, error))

    def _adapter(self, name: str) -> lora.Adapter:
        if name not in self._adapters:
            raise UserError(f"no adapter {name} in this worker")
        return self._adapters[name]

    def _create(self, body):
        if body.adapter in self._adapters:
            raise WorkerError(f"adapter {body.adapter} exists already")
        layout = self._model.layout(lora.LoraConfig.of(body.lora))
        needed, free = 16 * layout.numel, self.adapter_bytes_limit - self.adapter_bytes()
        if needed > free:
            raise UserError(
                f"an adapter of rank {layout.config.rank} takes {needed} bytes, free are {max(free, 0)} of the "
                f"{self.adapter_bytes_limit} for adapters in training: choose a lower rank, or end sessions that are "
                "not needed"
            )
        if body.load_dir:
            self._adapters[body.adapter] = self._read(layout, body.load_dir, body.load_optimizer)
        else:
            self._adapters[body.adapter] = lora.create(layout, self._model.device)
        return protocol.Ack()

    def _read(self, layout: lora.Layout, directory: bytes, with_optimizer: bool) -> lora.Adapter:
        path = Path(directory.decode())
        stored = adapter_files.read_config(path, self._model.sites)
        if stored.shape() != layout.config.shape():
            raise UserError(
                f"the checkpoint {path} holds an adapter with {stored.shape()}, this model has {layout.config.shape()}"
            )
        weights = adapter_files.load_weights(layout, path, self._model.device)
        adapter = lora.with_zero_state(layout, weights)
        if with_optimizer:
            adapter_files.load_optimizer(adapter, path)
        return adapter

    def _drop(self, body):
        self._adapters.pop(body.adapter, None)
        return protocol.Ack()

    def _step(self, body):
        start = time.monotonic()
        result = protocol.OptimResult()
        for name, value in trainer.optim_step(self._adapter(body.adapter), body).items():
            result.metrics[name] = value
        result.compute_seconds = time.monotonic() - start
        return result

    def _save(self, body):
        adapter, path = self._adapter(body.adapter), Path(body.dir.decode())
        size = adapter_files.save_weights(adapter.layout, adapter.weights, self._model.name, path)
        if body.with_optimizer:
            size += adapter_files.save_optimizer(adapter, path)
        return protocol.SaveResult(bytes=size)

    def _load(self, body):
        adapter = self._adapter(body.adapter)
        self._adapters[body.adapter] = self._read(adapter.layout, body.dir, body.load_optimizer)
        return protocol.Ack()

    def _publish(self, body):
        self._versions.publish(body.version, self._adapter(body.adapter), body.dir.decode())
        return protocol.Ack()

    # ---- snapshots

    def set_draining(self, draining: bool) -> None:
        self._queue.draining = draining

    def drained(self) -> bool:
        return self._queue.drained()

    def snapshot(self, directory: Path):
        adapters = []
        for index, (name, adapter) in enumerate(self._adapters.items()):
            file = f"adapter-{index}.safetensors"
            adapter_files.save_state(adapter, directory / file)
            adapters.append({"adapter": name, "file": file, "last_request": self._last_request.get(name, 0)})
        versions = self._versions.on_disk()
        rows = [{"version": version, "dir": path} for version, path in versions.items()]
        adapter_files.write_manifest(directory, self._queue.next_number, adapters, rows)
        result = protocol.SnapshotResult(versions_on_disk=list(versions))
        for name, number in self._last_request.items():
            result.last_request[name] = number
        return result

    def restore(self, directory: Path) -> None:
        if self._adapters or len(self._queue):
            raise WorkerError("a snapshot is restored before anything else runs")
        manifest = adapter_files.read_manifest(directory)
        for entry in manifest["adapters"]:
            adapter = adapter_files.load_state(directory / entry["file"], self._model.layout, self._model.device)
            self._adapters[entry["adapter"]] = adapter
            self._last_request[entry["adapter"]] = entry["last_request"]
        for entry in manifest["versions"]:
            self._versions.restore(entry["version"], entry["dir"])
        self._queue.next_number = manifest["next_micro_batch"]


def _raiser(error: Exception):
    def run():
        raise error

    return run
