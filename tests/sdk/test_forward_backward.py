"""forward and forward_backward: values, shapes, accumulation, chunking, losses."""

import numpy as np
import pytest
import tinker
from tinker import types

from datums import adam, logprobs_of, random_datum, random_tokens, rl_datum, sequence_datum, train_step


def loss_of(result) -> float:
    return result.metrics["loss:sum"]


def test_loss_is_the_weighted_sum_of_logprobs(client):
    weights = [0.0, 0.5, 1.0, -0.25, 2.0]
    result = client.forward_backward([sequence_datum(random_tokens(1, 6), weights)], loss_fn="cross_entropy").result()
    (logprobs,) = logprobs_of(result)
    assert logprobs.shape == (5,) and (logprobs < 0).all()
    assert loss_of(result) == pytest.approx(-float(np.dot(logprobs, weights)), rel=1e-5)


def test_forward_gives_the_same_logprobs_and_no_gradient(client):
    data = [random_datum(2, 17), random_datum(3, 5)]
    forward = logprobs_of(client.forward(data, loss_fn="cross_entropy").result())
    client.optim_step(adam()).result()
    again = logprobs_of(client.forward(data, loss_fn="cross_entropy").result())
    for before, after in zip(forward, again):
        np.testing.assert_allclose(before, after, atol=1e-6)
    both = logprobs_of(client.forward_backward(data, loss_fn="cross_entropy").result())
    for one, other in zip(forward, both):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_ragged_batch_equals_its_datums_alone(client):
    lengths = [1, 2, 16, 77, 200, 3]
    data = [random_datum(10 + n, n) for n in lengths]
    together = logprobs_of(client.forward(data, loss_fn="cross_entropy").result())
    for datum, packed in zip(data, together):
        (alone,) = logprobs_of(client.forward([datum], loss_fn="cross_entropy").result())
        np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_eight_calls_of_one_equal_one_call_of_eight(service):
    data = [random_datum(20 + n, 4 + 3 * n) for n in range(8)]
    losses = []
    for split in (False, True):
        client = service.create_lora_training_client(base_model="test/tiny-llama", rank=8, seed=4).result()
        curve = []
        for _ in range(3):
            calls = [[datum] for datum in data] if split else [data]
            results = [client.forward_backward(call, loss_fn="cross_entropy") for call in calls]
            client.optim_step(adam()).result()
            curve.append(sum(loss_of(result.result()) for result in results))
        losses.append(curve)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_zero_weights_change_nothing(client):
    data = [sequence_datum(random_tokens(1, 9), [0.0] * 8)]
    before = logprobs_of(client.forward(data, loss_fn="cross_entropy").result())
    assert loss_of(client.forward_backward(data, loss_fn="cross_entropy").result()) == 0.0
    client.optim_step(adam(0.1)).result()
    np.testing.assert_array_equal(before[0], logprobs_of(client.forward(data, loss_fn="cross_entropy").result())[0])


def test_several_targets_a_position(client):
    tokens = random_tokens(3, 6)
    targets = np.array([random_tokens(40 + row, 3) for row in range(6)], dtype=np.int64)
    weights = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=targets.ravel().tolist(), dtype="int64", shape=[6, 3]),
            "weights": types.TensorData(data=weights.ravel().tolist(), dtype="float32", shape=[6, 3]),
        },
    )
    result = client.forward_backward([datum], loss_fn="cross_entropy").result()
    (logprobs,) = logprobs_of(result)
    assert logprobs.shape == (6, 3)
    assert loss_of(result) == pytest.approx(-float((logprobs * weights).sum()), rel=1e-4, abs=1e-4)
    for column in range(3):
        single = types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=targets[:, column].tolist(), dtype="int64", shape=[6])
            },
        )
        (alone,) = logprobs_of(client.forward([single], loss_fn="cross_entropy").result())
        np.testing.assert_allclose(logprobs[:, column], alone, atol=1e-5)


def test_sparse_targets_and_weights(client):
    import torch

    targets = torch.zeros(12, 40, dtype=torch.int64)
    weights = torch.zeros(12, 40)
    for row in range(12):
        targets[row, row % 5] = 7 + row
        weights[row, row % 5] = 0.5
    model_input = types.ModelInput.from_ints(random_tokens(5, 12))
    sparse = types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    flat = types.Datum(
        model_input=model_input,
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[7 + row for row in range(12)], dtype="int64", shape=[12]),
            "weights": types.TensorData(data=[0.5] * 12, dtype="float32", shape=[12]),
        },
    )
    losses = [loss_of(client.forward([datum], loss_fn="cross_entropy").result()) for datum in (sparse, flat)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_many_small_datums_arrive_in_chunks(client):
    data = [random_datum(n, 1 + n % 3) for n in range(1500)]
    result = client.forward(data, loss_fn="cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1500
    for index in (0, 1023, 1024, 1499):
        (alone,) = logprobs_of(client.forward([data[index]], loss_fn="cross_entropy").result())
        np.testing.assert_allclose(logprobs_of(result)[index], alone, atol=1e-5)


def reference_loss(name, lp, q, a, config):
    ratio = np.exp(lp - q)
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "ppo":
        lo, hi = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
        return -np.minimum(ratio * a, np.clip(ratio, lo, hi) * a).sum()
    if name == "cispo":
        lo, hi = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 4.0)
        return -(np.clip(ratio, lo, hi) * lp * a).sum()
    if name == "dro":
        return -(lp * a - 0.5 * config["beta"] * (lp - q) ** 2).sum()
    if name == "gspo":
        lo, hi = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
        s = np.exp((lp - q).mean())
        return -np.minimum(s * a, np.clip(s, lo, hi) * a).sum()
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name, config",
    [
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}),
        ("cispo", {}),
        ("cispo", {"clip_high_threshold": 1.1}),
        ("dro", {"beta": 0.05}),
        ("gspo", {}),
    ],
)
def test_policy_losses(client, name, config):
    tokens = random_tokens(6, 13)
    (lp,) = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())
    rng = np.random.default_rng(0)
    q = (lp + rng.normal(0, 0.4, lp.shape)).astype(np.float32)
    a = rng.normal(0, 1, lp.shape).astype(np.float32)
    more = {"sequence_ratio_mask": [1.0] * len(lp)} if name == "gspo" else {}
    datum = rl_datum(tokens, q.tolist(), a.tolist(), **more)
    result = client.forward_backward([datum], loss_fn=name, loss_fn_config=config or None).result()
    expected = reference_loss(name, lp.astype(np.float64), q, a, config)
    assert loss_of(result) == pytest.approx(expected, rel=2e-4, abs=2e-4)
    np.testing.assert_allclose(logprobs_of(result)[0], lp, atol=1e-5)


def with_spans(datum, prompt_rows, count, sequence="s:1:0"):
    prompt = types.PromptProvenanceSpan(sequence_id=sequence, length=prompt_rows)
    sampled = types.SampledProvenanceSpan(sequence_id=sequence, length=count - prompt_rows)
    return datum.with_provenance(model_input=[prompt, sampled], loss_fn_inputs=[prompt, sampled])


@pytest.mark.parametrize("config", [{}, {"ratio_max": 1.1}])
def test_stable_reinforce(client, config):
    """docs/losses.md: −Σ sg(min(ratio, c))·A·lp, with provenance on every datum."""
    tokens = random_tokens(6, 13)
    (lp,) = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())
    rng = np.random.default_rng(1)
    q = (lp + rng.normal(0, 0.8, lp.shape)).astype(np.float32)
    a = rng.normal(0, 1, lp.shape).astype(np.float32)
    a[:4] = 0
    datum = with_spans(rl_datum(tokens, q.tolist(), a.tolist()), 4, 12)
    result = client.forward_backward([datum], loss_fn="stable_reinforce", loss_fn_config=config or None).result()
    ratio = np.minimum(np.exp(lp.astype(np.float64) - q), config.get("ratio_max", 2.0))
    assert loss_of(result) == pytest.approx(-float((ratio * a * lp).sum()), rel=2e-4, abs=2e-4)


def test_stable_reinforce_refuses_advantages_on_the_prompt(client):
    datum = with_spans(rl_datum(random_tokens(6, 13), [-1.0] * 12, [1.0] * 12), 4, 12)
    with pytest.raises(tinker.RequestFailedError, match="advantages"):
        client.forward_backward([datum], loss_fn="stable_reinforce").result()


def test_on_policy_importance_sampling_moves_like_cross_entropy(service):
    """At ratio 1 the gradient of importance_sampling with advantage A is that of cross_entropy with weight A."""
    tokens = random_tokens(8, 21)
    advantages = [(-1.0) ** n * 0.5 for n in range(20)]
    after = []
    for name in ("cross_entropy", "importance_sampling"):
        client = service.create_lora_training_client(base_model="test/tiny-llama", rank=8, seed=9).result()
        (lp,) = logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())
        datum = sequence_datum(tokens, advantages) if name == "cross_entropy" else rl_datum(tokens, lp.tolist(), advantages)
        client.forward_backward([datum], loss_fn=name).result()
        client.optim_step(adam()).result()
        after.append(logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())[0])
    np.testing.assert_allclose(after[0], after[1], atol=2e-4)


def test_custom_loss_in_python(client):
    """forward, the user's function, then cross_entropy with -dL/dlogprobs: -sum lp as a custom loss is cross_entropy."""
    data = [random_datum(30, 12), random_datum(31, 7)]
    plain = loss_of(client.forward(data, loss_fn="cross_entropy").result())

    def negative_log_likelihood(data, logprobs):
        loss = -sum(values.sum() for values in logprobs)
        return loss, {"mine:mean": 3.0}

    result = client.forward_backward_custom(data, negative_log_likelihood).result()
    assert loss_of(result) == pytest.approx(plain, rel=1e-5)
    assert result.metrics["mine:mean"] == 3.0
    client.optim_step(adam()).result()
    assert loss_of(client.forward(data, loss_fn="cross_entropy").result()) < plain


def test_training_learns_a_sequence(client):
    data = [random_datum(1, 24)]
    losses = [train_step(client, data) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
