"""Datums and small measures used by several suites."""

import random

import numpy as np
import tinker
from tinker import types

VOCAB = 384


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def sequence_datum(tokens: list[int], weights: list[float] | None = None) -> types.Datum:
    """Next-token prediction over a whole sequence; weights (one a target) default to 1."""
    count = len(tokens) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[count]),
            "weights": types.TensorData(data=weights or [1.0] * count, dtype="float32", shape=[count]),
        },
    )


def random_datum(seed: int, length: int) -> types.Datum:
    return sequence_datum(random_tokens(seed, length + 1))


def rl_datum(tokens: list[int], logprobs: list[float], advantages: list[float], **more: list[float]) -> types.Datum:
    count = len(tokens) - 1
    arrays = {"logprobs": logprobs, "advantages": advantages, **more}
    inputs = {name: types.TensorData(data=data, dtype="float32", shape=[count]) for name, data in arrays.items()}
    inputs["target_tokens"] = types.TensorData(data=tokens[1:], dtype="int64", shape=[count])
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def logprobs_of(result) -> list[np.ndarray]:
    """One float32 array a datum."""
    return [
        np.asarray(output["logprobs"].data, dtype=np.float32).reshape(output["logprobs"].shape or [-1])
        for output in result.loss_fn_outputs
    ]


def adam(learning_rate: float = 1e-2, **more) -> types.AdamParams:
    return types.AdamParams(learning_rate=learning_rate, eps=1e-8, **more)


def train_step(client: tinker.TrainingClient, data: list[types.Datum], learning_rate: float = 1e-2) -> float:
    gradient = client.forward_backward(data, loss_fn="cross_entropy")
    update = client.optim_step(adam(learning_rate))
    loss = gradient.result().metrics["loss:sum"]
    update.result()
    return loss


def sample_tokens(sampler, prompt: list[int], **params) -> list[list[int]]:
    count = params.pop("num_samples", 1)
    result = sampler.sample(
        prompt=types.ModelInput.from_ints(prompt),
        num_samples=count,
        sampling_params=types.SamplingParams(**{"max_tokens": 8, **params}),
    ).result()
    return [sequence.tokens for sequence in result.sequences]
