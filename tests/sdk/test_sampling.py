"""Sampling: determinism, the support of temperature/top-k/top-p, stops, logprobs, versions of an adapter."""

import pickle

import numpy as np
import pytest
import tinker
from tinker import types

from conftest import LLAMA
from datums import logprobs_of, random_datum, random_tokens, sample_tokens, sequence_datum, train_step

PROMPT = random_tokens(100, 12)


@pytest.fixture
def sampler(service):
    return service.create_sampling_client(base_model=LLAMA)


def ask(sampler, prompt=PROMPT, num_samples=1, more=None, **params):
    return sampler.sample(
        prompt=types.ModelInput.from_ints(prompt),
        num_samples=num_samples,
        sampling_params=types.SamplingParams(**{"max_tokens": 8, "stop": [], **params}),
        **(more or {}),
    )


def forward_logprobs(client, tokens):
    return logprobs_of(client.forward([sequence_datum(tokens)], loss_fn="cross_entropy").result())[0]


def test_n_samples_have_unique_ids(sampler):
    sequences = ask(sampler, num_samples=5).result().sequences
    assert len({sequence.sequence_id for sequence in sequences}) == 5
    assert all(len(sequence.tokens) == len(sequence.logprobs) == 8 for sequence in sequences)
    assert len({tuple(sequence.tokens) for sequence in sequences}) > 1


def test_seeds_reproduce_whatever_runs_beside(sampler):
    alone = ask(sampler, num_samples=3, seed=11).result()
    crowd = [ask(sampler, random_tokens(n, 3 + n), num_samples=2, seed=n) for n in range(8)]
    beside = ask(sampler, num_samples=3, seed=11).result()
    for future in crowd:
        future.result()
    assert [s.tokens for s in alone.sequences] == [s.tokens for s in beside.sequences]
    other = ask(sampler, num_samples=3, seed=12).result()
    assert [s.tokens for s in alone.sequences] != [s.tokens for s in other.sequences]


def test_temperature_zero_is_greedy(sampler):
    (tokens,) = sample_tokens(sampler, PROMPT, temperature=0.0, stop=[])
    for position, token in enumerate(tokens):
        row = ask(
            sampler, PROMPT + tokens[:position], max_tokens=1, temperature=0.0, more={"topk_sample_logprobs": 2}
        ).result()
        best = row.sequences[0].topk_logprobs[0]
        assert best[0][0] == token or best[0][1] - best[1][1] < 1e-4


def test_top_k_and_top_p_limit_the_support(sampler):
    best = [token for token, _ in ask(sampler, max_tokens=1, more={"topk_sample_logprobs": 3}).result().sequences[0].topk_logprobs[0]]
    for params, allowed in (({"top_k": 1}, best[:1]), ({"top_k": 3}, best), ({"top_p": 1e-6}, best[:1])):
        drawn = {tokens[0] for tokens in sample_tokens(sampler, PROMPT, num_samples=40, max_tokens=1, stop=[], **params)}
        assert drawn <= set(allowed)
    assert len({t[0] for t in sample_tokens(sampler, PROMPT, num_samples=40, max_tokens=1, stop=[])}) > 3


def test_frequencies_follow_the_distribution(sampler):
    row = ask(sampler, max_tokens=1, more={"topk_sample_logprobs": 1}).result().sequences[0].topk_logprobs[0]
    token, logprob = row[0]
    count = 400
    hits = sum(t[0] == token for t in sample_tokens(sampler, PROMPT, num_samples=count, max_tokens=1, stop=[], seed=5))
    p = np.exp(logprob)
    assert abs(hits - count * p) < 5 * np.sqrt(count * p * (1 - p)) + 1


def test_sampled_logprobs_are_the_trainers(client):
    train_step(client, [random_datum(1, 20)])
    sampler = client.save_weights_and_get_sampling_client().result()
    for sequence in ask(sampler, num_samples=3, max_tokens=20).result().sequences:
        expected = forward_logprobs(client, PROMPT + sequence.tokens)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-5)


def test_prompt_logprobs_are_the_trainers(client):
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = random_tokens(7, 600)  # more than one prefill chunk
    values = sampler.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
    assert len(values) == 600 and values[0] is None
    np.testing.assert_allclose(values[1:], forward_logprobs(client, prompt), atol=1e-5)


def test_last_n_prompt_logprobs(sampler):
    full = ask(sampler, max_tokens=1, more={"include_prompt_logprobs": True}).result().prompt_logprobs
    last = ask(sampler, max_tokens=1, more={"include_prompt_logprobs": True, "prompt_logprobs_last_n": 4}).result()
    assert last.prompt_logprobs[:-4] == [None] * (len(PROMPT) - 4)
    np.testing.assert_allclose(last.prompt_logprobs[-4:], full[-4:], atol=1e-5)


def test_topk_prompt_logprobs(sampler):
    result = ask(sampler, max_tokens=1, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": 5}).result()
    rows = result.topk_prompt_logprobs
    assert len(rows) == len(PROMPT) and rows[0] is None
    for row, token, logprob in zip(rows[1:], PROMPT[1:], result.prompt_logprobs[1:]):
        values = [value for _, value in row]
        assert len(row) == 5 and values == sorted(values, reverse=True)
        for candidate, value in row:
            if candidate == token:
                assert value == pytest.approx(logprob, abs=1e-5)


def test_target_prompt_logprobs(sampler):
    result = ask(
        sampler,
        max_tokens=1,
        more={
            "include_prompt_logprobs": True,
            "target_prompt_logprobs": types.TensorData(
                data=[value for token in PROMPT[1:] for value in (token, -1)], dtype="int64", shape=[len(PROMPT) - 1, 2]
            ),
        },
    ).result()
    targets = np.asarray(result.target_prompt_logprobs.data).reshape(-1, 2)
    np.testing.assert_allclose(targets[:, 0], result.prompt_logprobs[1:], atol=1e-5)
    assert (targets[:, 1] == 0).all()


def test_prompt_alternatives(sampler):
    alternatives = ask(sampler, max_tokens=1, more={"prompt_alt_tokens_k": 3}).result().prompt_alt_tokens
    assert list(alternatives.tokens.shape) == list(alternatives.logprobs.shape) == [len(PROMPT) - 1, 3]
    assert (np.asarray(alternatives.logprobs.data) <= 0).all()


def test_stop_tokens_end_a_sequence_and_are_returned(sampler):
    (free,) = sample_tokens(sampler, PROMPT, max_tokens=30, seed=3, stop=[])
    stop = free[10]
    sequence = ask(sampler, max_tokens=30, seed=3, stop=[stop]).result().sequences[0]
    assert sequence.tokens == free[: free.index(stop) + 1]
    assert sequence.stop_reason == "stop"
    assert ask(sampler, max_tokens=5, seed=3).result().sequences[0].stop_reason == "length"


def test_stop_strings_span_tokens(client, sampler):
    tokenizer = client.get_tokenizer()
    for seed in range(40):
        (free,) = sample_tokens(sampler, PROMPT, max_tokens=30, seed=seed, stop=[])
        text = tokenizer.decode(free[5:7])
        if len(text) > 2 and "\ufffd" not in text and text.isascii():
            break
    stop = text[:-1] if len(tokenizer.decode(free[6:7])) > 1 else text
    for form in (stop, [stop], ["never in there", stop]):
        sequence = ask(sampler, max_tokens=30, seed=seed, stop=form).result().sequences[0]
        assert sequence.stop_reason == "stop"
        assert sequence.tokens == free[: len(sequence.tokens)] and len(sequence.tokens) <= 7
        assert stop in tokenizer.decode(sequence.tokens)
        assert stop not in tokenizer.decode(sequence.tokens[:-1])


def test_empty_stop_ignores_eos_and_absent_stop_honours_it(client):
    """An adapter that says EOS at once shows the difference."""
    eos = 2
    data = [sequence_datum([*PROMPT, eos], [0.0] * (len(PROMPT) - 1) + [1.0])]
    for _ in range(25):
        train_step(client, data, learning_rate=2e-2)
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt, greedy = types.ModelInput.from_ints(PROMPT), dict(max_tokens=6, temperature=0.0)
    ends = sampler.sample(prompt, 1, types.SamplingParams(**greedy)).result().sequences[0]
    assert ends.tokens == [eos] and ends.stop_reason == "stop"
    goes_on = sampler.sample(prompt, 1, types.SamplingParams(stop=[], **greedy)).result().sequences[0]
    assert len(goes_on.tokens) == 6 and goes_on.stop_reason == "length"
    other = sampler.sample(prompt, 1, types.SamplingParams(stop=[300], **greedy)).result().sequences[0]
    assert other.tokens == [eos]


def test_a_sampler_keeps_the_weights_it_was_made_with(client):
    data = [random_datum(3, 20)]
    before = client.save_weights_and_get_sampling_client().result()
    probe = types.ModelInput.from_ints(PROMPT)
    first = before.compute_logprobs(probe).result()
    for _ in range(5):
        train_step(client, data)
    after = client.save_weights_and_get_sampling_client().result()
    assert before.compute_logprobs(probe).result() == first
    assert after.compute_logprobs(probe).result() != first


def test_named_sampler_weights(service, client):
    train_step(client, [random_datum(3, 20)])
    path = client.save_weights_for_sampler("named").result().path
    assert path == f"tinker://{client.model_id}/sampler_weights/named"
    sampler = service.create_sampling_client(model_path=path)
    assert sampler.get_base_model() == LLAMA
    probe = types.ModelInput.from_ints(PROMPT)
    live = client.save_weights_and_get_sampling_client().result()
    assert sampler.compute_logprobs(probe).result() == live.compute_logprobs(probe).result()


def test_pickled_client_samples_too(sampler):
    copy = pickle.loads(pickle.dumps(sampler))
    assert sample_tokens(copy, PROMPT, seed=4) == sample_tokens(sampler, PROMPT, seed=4)


def test_many_requests_at_once(sampler):
    futures = [ask(sampler, random_tokens(n, 2 + n % 40), seed=n, max_tokens=1 + n % 8) for n in range(200)]
    results = [future.result() for future in futures]
    assert [len(result.sequences[0].tokens) for result in results] == [1 + n % 8 for n in range(200)]


def test_prompt_that_fills_the_context(make_server, connect):
    service = connect(make_server("short", None, "--max-seq-len", "64"))
    sampler = service.create_sampling_client(base_model=LLAMA)
    sequence = sampler.sample(
        types.ModelInput.from_ints(random_tokens(1, 60)), 1, types.SamplingParams(stop=[])
    ).result().sequences[0]
    assert sequence.stop_reason == "length" and 1 <= len(sequence.tokens) <= 5
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match="64"):
        sampler.sample(types.ModelInput.from_ints(random_tokens(1, 65)), 1, types.SamplingParams(max_tokens=1)).result()
