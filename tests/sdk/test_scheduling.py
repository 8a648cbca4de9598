"""Whose turn it is: samples during training, cancelled generations, shared prompts; and calls that span several requests."""

import json
import time

import numpy as np
import pytest
from tinker import types

import models
from conftest import LLAMA
from datums import adam, logprobs_of, random_datum, random_tokens, sequence_datum, train_step
from server import Server

PROMPT = random_tokens(100, 12)


def sample(sampler, prompt=PROMPT, num_samples=1, **params):
    return sampler.sample(
        types.ModelInput.from_ints(prompt), num_samples, types.SamplingParams(**{"max_tokens": 1, "stop": [], **params})
    )


def done_in_time(training, sampler, observe):
    """What `observe` gave after each of a row of one-token samples that were answered before `training` was."""
    seen = []
    while True:
        sample(sampler).result()
        value = observe()
        if training.future().done():
            return seen
        seen.append(value)


@pytest.fixture(scope="module")
def deep_server(tmp_path_factory):
    """Of a model whose micro-batches take much longer than anything on the way to the client."""
    root = tmp_path_factory.mktemp("deep")
    deep = models.write_model(root / "model", "llama", num_hidden_layers=12, intermediate_size=320)
    server = Server({LLAMA: deep}, root / "data").start()
    yield server
    server.stop()


def trainer_and_sampler(service):
    """A training client, and a client of the base model that has sampled before."""
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=1).result()
    sampler = service.create_sampling_client(base_model=LLAMA).result()
    sample(sampler).result()
    return client, sampler


def test_a_sample_waits_for_one_micro_batch(deep_server, connect):
    client, sampler = trainer_and_sampler(connect(deep_server))
    before = deep_server.micro_batches()
    # Each datum fills a micro-batch of the default 2,048 tokens.
    training = client.forward_backward([random_datum(n, 2000) for n in range(8)], loss_fn="cross_entropy")
    counts = [before, *done_in_time(training, sampler, deep_server.micro_batches)]
    training.result()
    assert deep_server.micro_batches() - before == 8
    passed = np.diff(counts)
    assert len(passed) >= 8, counts
    # The one that ran when the sample came; a second may end between the answer and the count.
    assert max(passed) <= 2 and np.mean(passed > 1) <= 0.25, passed


def test_a_long_datum_lets_samples_through_between_blocks(deep_server, connect):
    client, sampler = trainer_and_sampler(connect(deep_server))
    before = deep_server.micro_batches()
    training = client.forward_backward([random_datum(1, 6000)], loss_fn="cross_entropy")
    counts = done_in_time(training, sampler, deep_server.micro_batches)
    training.result()
    assert deep_server.micro_batches() - before == 1
    # The one micro-batch has 12 blocks each way. One sample may have been answered before it began.
    assert counts.count(before) >= 6, counts


def test_a_cancel_is_answered_and_acts_within_a_micro_batch(deep_server, connect):
    client, sampler = trainer_and_sampler(connect(deep_server))
    before = deep_server.micro_batches()
    training = client.forward_backward([random_datum(1, 6000)], loss_fn="cross_entropy")
    body = {
        "sampling_session_id": sampler._sampling_session_id,
        "seq_id": 10**9,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": 30000, "stop": []},
    }
    request_id = deep_server.post("asample", body)[1]["request_id"]
    assert deep_server.post("cancel_future", {"request_id": request_id})[0] == 200
    status, answer = deep_server.post("retrieve_future", {"request_id": request_id})
    assert status == 200 and answer["category"] == "user" and "cancel" in answer["error"]
    sample(sampler).result()
    assert deep_server.micro_batches() == before and not training.future().done()
    training.result()
    train_step(client, [random_datum(2, 20)])


def test_a_cancelled_generation_stops_computing(make_server, connect):
    """One slot: who waits behind a long generation gets it when that is cancelled, and long before its own end."""
    server = make_server("slot", None, "--backend-config", json.dumps({"max_sampling_sequences": 1}))
    service = connect(server)
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=1).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    asked = time.monotonic()
    sample(sampler, max_tokens=600).result()
    seconds_of_30000 = 50 * (time.monotonic() - asked)
    long = sample(sampler, max_tokens=30000)
    behind = sample(sampler)
    with pytest.raises(TimeoutError):
        behind.result(timeout=1)
    assert not long.future().done()
    long.future().cancel()
    cancelled = time.monotonic()
    behind.result(timeout=120)
    assert time.monotonic() - cancelled < seconds_of_30000 / 4
    assert len(sample(sampler, max_tokens=3).result().sequences[0].tokens) == 3
    assert train_step(client, [random_datum(1, 20)]) > train_step(client, [random_datum(1, 20)])


def test_samples_of_one_prompt_share_its_prefill(server, service):
    """8 samples of a long prompt take about the time of 1; prompts differ, so that nothing comes from an earlier one."""
    sampler = service.create_sampling_client(base_model=LLAMA)
    seconds = {1: [], 8: []}
    for round in range(3):
        for count in seconds:
            asked = time.monotonic()
            sample(sampler, random_tokens(1000 * round + count, 6000), num_samples=count).result()
            seconds[count].append(time.monotonic() - asked)
    assert min(seconds[8]) < 2.5 * min(seconds[1]), seconds


def test_requests_of_one_prompt_share_its_prefill(server, service):
    sampler = service.create_sampling_client(base_model=LLAMA)
    prompt = random_tokens(770077, 2000)
    hits = [future.result().prompt_cache_hit_tokens for future in [sample(sampler, prompt) for _ in range(6)]]
    block = 16
    assert sorted(hits)[0] == 0
    assert all(hit >= len(prompt) - 2 * block for hit in sorted(hits)[1:]), hits


def test_string_stops_work_at_once_after_a_restart(make_server, connect):
    server = make_server("stops")
    service = connect(server)
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=1).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    tokenizer = client.get_tokenizer()
    texts = [(seed, tokenizer.decode(sample(sampler, max_tokens=20, seed=seed).result().sequences[0].tokens[3:6]))
             for seed in range(40)]
    seed, stop = next((seed, text) for seed, text in texts if len(text) > 2 and text.isascii())
    first = sample(sampler, max_tokens=20, seed=seed, stop=[stop]).result().sequences[0]
    assert first.stop_reason == "stop" and len(first.tokens) <= 6
    server.stop()
    server.start()
    again = sample(sampler, max_tokens=20, seed=seed, stop=[stop]).result().sequences[0]
    assert again.tokens == first.tokens and again.logprobs == pytest.approx(first.logprobs, abs=1e-6)


def test_custom_loss_steps_like_the_built_in_one(service):
    """The gradient of −Σ w·lp by the SDK's detour is the one that cross_entropy makes itself."""
    data = [random_datum(30, 12), random_datum(31, 7)]
    after = []
    for custom in (False, True):
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=3).result()
        for _ in range(2):
            if custom:
                call = client.forward_backward_custom(data, lambda data, lps: (-sum(lp.sum() for lp in lps), {}))
            else:
                call = client.forward_backward(data, loss_fn="cross_entropy")
            client.optim_step(adam())
            call.result()
        after += [logprobs_of(client.forward(data, loss_fn="cross_entropy").result())]
    for one, other in zip(*after):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_dense_and_sparse_targets_step_alike(service):
    """(N, K) targets and weights as tensors go over the wire as CSR when that is smaller."""
    import torch

    rng = np.random.default_rng(0)
    targets, weights = np.zeros((24, 40), dtype=np.int64), np.zeros((24, 40), dtype=np.float32)
    for row in range(24):
        columns = rng.choice(40, 3, replace=False)
        targets[row, columns] = rng.integers(3, 384, 3)
        weights[row, columns] = rng.normal(size=3)
    model_input = types.ModelInput.from_ints(random_tokens(5, 24))
    dense = {
        "target_tokens": types.TensorData(data=targets.ravel().tolist(), dtype="int64", shape=[24, 40]),
        "weights": types.TensorData(data=weights.ravel().tolist(), dtype="float32", shape=[24, 40]),
    }
    sparse = {"target_tokens": torch.from_numpy(targets), "weights": torch.from_numpy(weights)}
    after = []
    for inputs in (dense, sparse):
        datum = types.Datum(model_input=model_input, loss_fn_inputs=inputs)
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=3).result()
        losses = [train_step(client, [datum]) for _ in range(2)]
        probe = logprobs_of(client.forward([sequence_datum(random_tokens(6, 20))], loss_fn="cross_entropy").result())
        after.append((losses, probe[0]))
    assert datum.loss_fn_inputs["weights"].sparse_crow_indices is not None
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-6)
    np.testing.assert_allclose(after[0][1], after[1][1], atol=1e-6)


def test_three_thousand_datums_are_one_call(service):
    """Three chunks of at most 1,024: results in order, and one gradient."""
    data = [random_datum(n, 1 + n % 4) for n in range(3000)]
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=3).result()
    result = client.forward_backward(data, loss_fn="cross_entropy").result()
    client.optim_step(adam()).result()
    logprobs = logprobs_of(result)
    assert [len(row) for row in logprobs] == [1 + n % 4 for n in range(3000)]
    assert result.metrics["loss:sum"] == pytest.approx(-sum(float(row.sum()) for row in logprobs), rel=1e-5)
    other = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=3).result()
    for begin in range(0, 3000, 500):
        other.forward_backward(data[begin : begin + 500], loss_fn="cross_entropy")
    other.optim_step(adam()).result()
    probe = [sequence_datum(random_tokens(6, 20))]
    stepped = [logprobs_of(c.forward(probe, loss_fn="cross_entropy").result())[0] for c in (client, other)]
    np.testing.assert_allclose(stepped[0], stepped[1], atol=2e-4)
