"""Below the SDK: what its retries, its polls and its long life demand of the server (plain HTTP)."""

import http.client
import json
import threading
import time

import numpy as np
import pytest
import tinker
from tinker import types
from tinker.proto import tinker_public_pb2 as wire

from conftest import LLAMA
from datums import random_datum, random_tokens, train_step

PROMPT = random_tokens(100, 12)
CUT = b'{"adam_params": {"learning_rate": 0.01}, "model_id": "%s", "seq_id": %d, "ty'


def exchange(server, method, path, body=b"", headers=None):
    """(status, headers, body) without any help of a client library."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"X-API-Key": "tml-test", "Content-Type": "application/json", **(headers or {})}
        connection.request(method, f"/api/v1/{path}", body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def poll(server, request_id):
    return exchange(server, "POST", "retrieve_future", json.dumps({"request_id": request_id}).encode())


@pytest.fixture
def session(server):
    return server.post("create_session", {"tags": [], "sdk_version": "0.38.0"})[1]["session_id"]


@pytest.fixture
def model(server, session):
    body = {"session_id": session, "model_seq_id": 0, "base_model": LLAMA, "lora_config": {"rank": 4, "seed": 1}}
    status, answer = server.post("create_model", body)
    assert status == 200 and poll(server, answer["request_id"])[0] == 200
    return answer["model_id"]


@pytest.fixture
def sampler(server, session):
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": LLAMA}
    return server.post("create_sampling_session", body)[1]["sampling_session_id"]


def asample(sampler, seq_id, prompt=PROMPT, **params):
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
        "sampling_params": {"max_tokens": 4, "stop": [], **params},
        "prompt_logprobs": False,
    }


def step(model, seq_id, learning_rate=1e-3):
    return {"adam_params": {"learning_rate": learning_rate}, "model_id": model, "seq_id": seq_id, "type": "optim_step"}


def test_a_result_can_be_fetched_again_and_twice_at_once(server, sampler):
    request_id = server.post("asample", asample(sampler, 0))[1]["request_id"]
    answers = [None] * 4
    threads = [
        threading.Thread(target=lambda n=n: answers.__setitem__(n, poll(server, request_id))) for n in range(len(answers))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.append(poll(server, request_id))
    assert {status for status, _, _ in answers} == {200}
    assert {headers["Content-Type"] for _, headers, _ in answers} == {"application/x-protobuf"}
    assert len({body for _, _, body in answers}) == 1
    assert len(wire.SampleResponse.FromString(answers[0][2]).sequences) == 2


def test_a_resent_sample_is_the_same_request(server, sampler):
    first, again = server.post("asample", asample(sampler, 7)), server.post("asample", asample(sampler, 7))
    assert first == again and len(set(first[1]["sample_sequence_ids"])) == 2
    other = server.post("asample", asample(sampler, 7, max_tokens=5))
    assert other[0] == 400 and "same" in other[1]["detail"]
    # Numbers of a sampler are no order, and clones count from 10^9 k.
    assert server.post("asample", asample(sampler, 999_999_999 * 1_000_000_000))[0] == 200


def test_samples_of_equal_sequence_ids_are_told_apart_by_sampler(server, session, sampler):
    body = {"session_id": session, "sampling_session_seq_id": 1, "base_model": LLAMA}
    other = server.post("create_sampling_session", body)[1]["sampling_session_id"]
    ids = [server.post("asample", asample(name, 0))[1]["sample_sequence_ids"] for name in (sampler, other)]
    assert len(set(ids[0] + ids[1])) == 4


def test_a_resent_creation_is_the_same_model(server, session):
    body = {"session_id": session, "model_seq_id": 3, "base_model": LLAMA, "lora_config": {"rank": 4}}
    assert server.post("create_model", body) == server.post("create_model", body)
    status, answer = server.post("create_model", {**body, "lora_config": {"rank": 8}})
    assert status == 400 and answer["detail"]


def test_a_resent_step_is_done_once(server, model):
    for number in (1, 1, 2, 2, 1):
        status, answer = server.post("optim_step", step(model, number))
        assert status == 200 and poll(server, answer["request_id"])[0] == 200
    status, answer = server.post("optim_step", step(model, 1, learning_rate=5e-3))
    assert status == 400 and "same" in answer["detail"]


def test_a_finished_save_that_comes_again_leaves_nothing_behind(server, model):
    body = {"model_id": model, "path": "again", "seq_id": 1, "type": "save_weights"}
    for _ in range(2):
        status, answer = server.post("save_weights", body)
        assert status == 200
        result = json.loads(poll(server, answer["request_id"])[2])
        assert result == {"path": f"tinker://{model}/weights/again", "type": "save_weights"}
    assert not list((server.data_dir / "staging").glob(f"{model}*"))
    status, answer = server.post("save_weights", {**body, "seq_id": 2})
    failed = json.loads(poll(server, answer["request_id"])[2])
    assert failed["category"] == "user" and "again" in failed["error"]


REFUSED = [
    ("optim_step", b"{"),
    ("optim_step", b"[]"),
    ("create_session", b'{"tags": 5}'),
    ("create_model", b'{"base_model": ""}'),
    ("asample", b'{"sampling_session_id": "x"}'),
    ("retrieve_future", b"{}"),
    ("forward_backward", b"{}"),
    ("weights_info", b'{"tinker_path": "nothing"}'),
]


@pytest.mark.parametrize("path, body", REFUSED)
def test_every_400_has_a_length(server, path, body):
    """The client takes a 400 without one for the word of a proxy and retries it."""
    status, headers, text = exchange(server, "POST", path, body)
    assert status == 400
    assert int(headers["Content-Length"]) == len(text) > 0
    assert json.loads(text)["detail"]


def test_a_refused_json_body_uses_its_number_up(server, model):
    assert exchange(server, "POST", "optim_step", CUT % (model.encode(), 1))[0] == 400
    status, answer = server.post("optim_step", step(model, 2))
    assert status == 200 and poll(server, answer["request_id"])[0] == 200


def test_an_oversized_body_uses_its_number_up(make_server, connect):
    """Its end never comes into memory; the number stands in its beginning."""
    server = make_server("small-bodies", None, "--max-body-bytes", "100000")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4).result()
    message = wire.ForwardBackwardRequest(model_id=client.model_id, seq_id=1, loss_fn="cross_entropy")
    message.data.add().model_input.add().encoded_text.tokens = bytes(4 * 50000)
    status, headers, body = exchange(
        server, "POST", "forward_backward", message.SerializeToString(), {"Content-Type": "application/x-protobuf"}
    )
    assert status == 400 and int(headers["Content-Length"]) > 0 and "100000" in body.decode()
    status, answer = server.post("optim_step", step(client.model_id, 2))
    assert status == 200 and poll(server, answer["request_id"])[0] == 200


@pytest.mark.parametrize("key", ["", "sk-wrong"])
def test_a_wrong_key_is_refused(server, key):
    assert exchange(server, "GET", "get_server_capabilities", headers={"X-API-Key": key})[0] == 401
    assert exchange(server, "GET", "get_server_capabilities")[0] == 200


def test_nobody_unknown_is_served(server, session):
    assert server.post("session_heartbeat", {"session_id": "nobody"})[0] == 404
    assert server.post("get_info", {"model_id": "nobody:train:0"})[0] == 404
    assert server.post("optim_step", step("nobody:train:0", 1))[0] == 404
    assert server.post("asample", asample("nobody:sample:0", 0))[0] == 404
    assert server.request("GET", "samplers/nobody:sample:0")[0] == 404
    body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": "tinker://no:train:0/weights/x"}
    assert server.post("create_sampling_session", body)[0] == 404
    assert poll(server, "nobody")[0] == 404


def test_the_end_of_a_session(server, session, model, sampler):
    """Its work ends, its numbers are refused, heartbeats hear 410, the first reason wins, results stay."""
    done = server.post("optim_step", step(model, 1))[1]["request_id"]
    assert poll(server, done)[0] == 200
    parked = server.post("optim_step", step(model, 5))[1]["request_id"]
    long = server.post("asample", asample(sampler, 0, max_tokens=30000))[1]["request_id"]
    for reason in ("errored", "success"):
        assert server.post(f"sessions/{session}/finish", {"reason": {"type": reason}, "detail": None})[0] == 200
    assert server.post("session_heartbeat", {"session_id": session})[0] == 410
    for request_id in (parked, long):
        status, _, body = poll(server, request_id)
        assert status == 200 and json.loads(body)["category"] in ("user", "server")
    assert poll(server, done)[0] == 200
    assert server.post("optim_step", step(model, 2))[0] in (400, 403)
    assert server.post("asample", asample(sampler, 1))[0] in (400, 403)
    assert server.post(f"sessions/{session}/finish", {"reason": {"type": "bored"}})[0] == 400


def test_a_cancelled_sample_ends(server, sampler):
    request_id = server.post("asample", asample(sampler, 0, max_tokens=30000))[1]["request_id"]
    time.sleep(0.2)
    start = time.monotonic()
    assert server.post("cancel_future", {"request_id": request_id})[0] == 200
    status, _, body = poll(server, request_id)
    assert time.monotonic() - start < 10
    assert status in (200, 410) and (status == 410 or "error" in json.loads(body))
    for other in (request_id, "nobody"):
        assert server.post("cancel_future", {"request_id": other})[0] == 200


def test_a_pending_poll_wakes_up_at_once(server, model):
    """Held while there is nothing to say, and answered by the event, not by the next look at a clock."""
    parked = server.post("optim_step", step(model, 2))[1]["request_id"]
    answer = []
    waiting = threading.Thread(target=lambda: answer.append(poll(server, parked)))
    waiting.start()
    waiting.join(1)
    assert not answer
    assert server.post("optim_step", step(model, 1))[0] == 200
    waiting.join(10)  # far below the hold of 30 s
    status, _, body = answer[0]
    assert status == 200 and json.loads(body)["metrics"]["step"] == 2


@pytest.mark.slow
def test_a_poll_without_news_is_told_to_come_again(server, model):
    parked = server.post("optim_step", step(model, 2))[1]["request_id"]
    asked = time.monotonic()
    status, headers, body = poll(server, parked)
    assert 20 <= time.monotonic() - asked <= 40
    assert status == 408 and json.loads(body)["type"] == "try_again", body
    assert server.post("optim_step", step(model, 1))[0] == 200
    assert poll(server, parked)[0] == 200


@pytest.mark.slow
def test_a_silent_session_expires_and_gives_its_models_back(make_server):
    server = make_server("silent", None, "--session-timeout", "10")
    quiet, lively = (server.post("create_session", {"tags": [], "sdk_version": "0.38.0"})[1]["session_id"] for _ in "ab")
    names = []
    for session in (quiet, lively):
        body = {"session_id": session, "model_seq_id": 0, "base_model": LLAMA, "lora_config": {"rank": 4}}
        names.append(server.post("create_model", body)[1]["model_id"])
    parked = server.post("optim_step", step(names[0], 2))[1]["request_id"]
    for _ in range(20):
        assert server.post("session_heartbeat", {"session_id": lively})[0] == 200
        time.sleep(1)
    assert server.post("session_heartbeat", {"session_id": quiet})[0] == 410
    status, _, body = poll(server, parked)
    assert status == 200 and "error" in json.loads(body)
    assert server.post("optim_step", step(names[0], 1))[0] in (400, 403)
    status, answer = server.post("optim_step", step(names[1], 1))
    assert status == 200 and poll(server, answer["request_id"])[0] == 200


ABSENT = ["auth/token", "copy_weights", "create_custom_loss", "retrieve_futures", "sessions/search", "no/such/thing"]


@pytest.mark.parametrize("path", ABSENT)
def test_absent_endpoints_are_named(server, path):
    status, answer = server.post(path, {})
    assert status == 404 and path in answer["detail"]


def test_an_absent_numbered_endpoint_uses_its_number_up(server, model):
    body = {"model_id": model, "seq_id": 1, "path": "x", "type": "save_weights_external"}
    status, answer = server.post("save_weights_external", body)
    assert status == 404 and "save_weights_external" in answer["detail"]
    status, answer = server.post("optim_step", step(model, 2))
    assert status == 200 and poll(server, answer["request_id"])[0] == 200


def test_unknown_fields_are_ignored(server, session):
    body = {"session_id": session, "sampling_session_seq_id": 9, "base_model": LLAMA, "colour": {"of": ["sky"]}}
    assert server.post("create_sampling_session", body)[0] == 200


# ---- through the SDK: scoring --------------------------------------------------------------------------------------


def test_scores_of_a_prompt_that_fills_the_context(make_server, connect):
    sampler = connect(make_server("context", None, "--max-seq-len", "48")).create_sampling_client(base_model=LLAMA).result()
    full = types.ModelInput.from_ints(random_tokens(1, 48))
    assert len(sampler.compute_logprobs(full).result()) == 48
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match="49"):
        sampler.compute_logprobs(types.ModelInput.from_ints(random_tokens(1, 49))).result()
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match="40.*9.*48"):
        sampler.sample(types.ModelInput.from_ints(random_tokens(1, 40)), 1, types.SamplingParams(max_tokens=9)).result()


def score(service, **more):
    sampler = service.create_sampling_client(base_model=LLAMA).result()
    return sampler.sample(
        types.ModelInput.from_ints(PROMPT), 1, types.SamplingParams(max_tokens=1), include_prompt_logprobs=True, **more
    ).result()


def test_sparse_targets_get_the_values_of_dense_ones(service):
    rows, width = len(PROMPT) - 1, 40
    dense = np.full((rows, width), -1)
    dense[np.arange(rows), np.arange(rows) % width] = PROMPT[1:]
    dense[2, 20] = 77
    row, column = np.nonzero(dense >= 0)
    sparse = types.TensorData(
        data=dense[row, column].tolist(),
        dtype="int64",
        shape=[rows, width],
        sparse_crow_indices=np.searchsorted(row, np.arange(rows + 1)).tolist(),
        sparse_col_indices=column.tolist(),
    )
    full = types.TensorData(data=dense.reshape(-1).tolist(), dtype="int64", shape=[rows, width])
    results = [score(service, target_prompt_logprobs=targets).target_prompt_logprobs for targets in (full, sparse)]
    values = np.asarray(results[0].data).reshape(rows, width)
    assert list(results[1].sparse_col_indices) == column.tolist() and list(results[1].shape) == [rows, width]
    np.testing.assert_allclose(results[1].data, values[row, column], atol=1e-6)
    assert (values[dense < 0] == 0).all() and (values[dense >= 0] < 0).all()


def test_top_candidates_contain_the_best_alternatives(service):
    result = score(service, topk_prompt_logprobs=4, prompt_alt_tokens_k=64)
    drawn = np.asarray(result.prompt_alt_tokens.tokens.data).reshape(-1, 64)
    logprobs = np.asarray(result.prompt_alt_tokens.logprobs.data).reshape(-1, 64)
    for best, tokens, values in zip(result.topk_prompt_logprobs[1:], drawn, logprobs, strict=True):
        known = dict(best)
        for token, value in zip(tokens.tolist(), values.tolist(), strict=True):
            assert value == pytest.approx(known[token], abs=1e-4) if token in known else value <= best[-1][1] + 1e-4


def test_a_prompt_of_one_token_has_no_scores(service):
    sampler = service.create_sampling_client(base_model=LLAMA).result()
    assert sampler.compute_logprobs(types.ModelInput.from_ints([5])).result() == [None]


def test_training_goes_on_after_a_refused_call(client):
    with pytest.raises(tinker.RequestFailedError):
        client.forward_backward([random_datum(1, 8)], "no_such_loss").result()
    assert train_step(client, [random_datum(1, 8)]) > train_step(client, [random_datum(1, 8)])
