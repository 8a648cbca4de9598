"""optim_step: AdamW with all its fields, accumulation, clipping, metrics."""

import math

import numpy as np
import pytest
import tinker
from tinker import types

from conftest import LLAMA
from datums import adam, logprobs_of, random_datum, train_step

DATA = [random_datum(1, 20)]


def logprobs(client):
    return logprobs_of(client.forward(DATA, loss_fn="cross_entropy").result())[0]


def test_metrics(client):
    client.forward_backward(DATA, loss_fn="cross_entropy").result()
    metrics = client.optim_step(adam(3e-3)).result().metrics
    assert math.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert any(value == pytest.approx(3e-3) for value in metrics.values()), metrics


def test_gradients_accumulate_until_the_step(service):
    norms = []
    for calls in (1, 2):
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
        for _ in range(calls):
            client.forward_backward(DATA, loss_fn="cross_entropy")
        norms.append(client.optim_step(adam()).result().metrics["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def test_step_without_gradient_changes_nothing_on_a_fresh_adapter(client):
    before = logprobs(client)
    metrics = client.optim_step(adam(0.1)).result().metrics
    assert metrics["grad_norm"] == 0
    np.testing.assert_array_equal(before, logprobs(client))


def test_zero_learning_rate_changes_nothing(client):
    before = logprobs(client)
    train_step(client, DATA, learning_rate=0.0)
    np.testing.assert_array_equal(before, logprobs(client))


def test_the_first_step_of_adam_is_independent_of_the_gradients_scale(service):
    """m̂/√v̂ is the sign of the gradient at step 1, so a loss weighted by 1000 moves the weights alike."""
    after = []
    for scale in (1.0, 1000.0):
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
        inputs = dict(DATA[0].loss_fn_inputs, weights=types.TensorData(data=[scale] * 20, dtype="float32", shape=[20]))
        client.forward_backward([types.Datum(DATA[0].model_input, inputs)], loss_fn="cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3, eps=1e-12)).result()
        after.append(logprobs(client))
    np.testing.assert_allclose(after[0], after[1], atol=1e-4)


def test_clipping_bounds_what_the_moments_see(service):
    """grad_norm reports the norm before clipping; two clipped steps differ from two unclipped ones."""
    curves = {}
    for clip in (0.0, 1e-3):
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
        norms = []
        for step in range(3):
            client.forward_backward([random_datum(step, 20)], loss_fn="cross_entropy")
            norms.append(client.optim_step(adam(1e-2, grad_clip_norm=clip)).result().metrics["grad_norm"])
        curves[clip] = (norms, logprobs(client))
    assert curves[0.0][0][0] == pytest.approx(curves[1e-3][0][0], rel=1e-5)
    assert not np.array_equal(curves[0.0][1], curves[1e-3][1])


def test_weight_decay_shrinks_the_adapter(service):
    """With decay and no gradient a trained adapter fades towards the base."""
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    base = logprobs(client)
    for _ in range(5):
        train_step(client, DATA)
    trained = np.abs(logprobs(client) - base).max()
    for _ in range(30):
        client.optim_step(types.AdamParams(learning_rate=0.1, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=1.0))
    assert np.abs(logprobs(client) - base).max() < 0.2 * trained


@pytest.mark.parametrize(
    "field, value",
    [("learning_rate", float("inf")), ("learning_rate", float("nan")), ("learning_rate", -1e-3), ("beta1", 1.5), ("beta2", -0.1), ("eps", -1.0)]
)
def test_impossible_settings_are_named(client, field, value):
    with pytest.raises(tinker.RequestFailedError, match=field) as caught:
        client.optim_step(types.AdamParams(**{field: value})).result()
    assert caught.value.category == "user"
    train_step(client, DATA)


def test_overflowing_gradient_fails_the_step_and_keeps_the_weights(client):
    before = logprobs(client)
    inputs = dict(DATA[0].loss_fn_inputs, weights=types.TensorData(data=[3e38] * 20, dtype="float32", shape=[20]))
    client.forward_backward([types.Datum(DATA[0].model_input, inputs)], loss_fn="cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="finite"):
        client.optim_step(adam()).result()
    np.testing.assert_array_equal(before, logprobs(client))
    losses = [train_step(client, DATA) for _ in range(3)]
    assert losses[-1] < losses[0]
