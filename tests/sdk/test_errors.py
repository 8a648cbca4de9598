"""Every kind of wrong input gets a clear error that names the value, and the model's next call works."""

import json
import re

import numpy as np
import pytest
import tinker
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as wire

from conftest import LLAMA
from datums import VOCAB, random_datum, random_tokens, rl_datum, sequence_datum, train_step

TOKENS = random_tokens(1, 9)


@pytest.fixture
def healthy(client):
    """The client, and afterwards proof that it still trains as an untouched one does."""
    yield client
    losses = [train_step(client, [random_datum(2, 12)]) for _ in range(3)]
    assert losses[-1] < losses[0]


def tensor(data, dtype="float32", shape=None):
    return types.TensorData(data=data, dtype=dtype, shape=shape or [len(data)])


def datum(inputs, tokens=TOKENS[:-1]):
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


TARGETS = tensor(TOKENS[1:], "int64")
NAN = float("nan")

WRONG = {
    "loss": ([sequence_datum(TOKENS)], "cross_entropi", None, "cross_entropi"),
    "config key": ([sequence_datum(TOKENS)], "cross_entropy", {"clip_hi": 1.0}, "clip_hi"),
    "config value": (
        [rl_datum(TOKENS, [-1.0] * 8, [1.0] * 8)],
        "ppo",
        {"clip_high_threshold": NAN},
        "clip_high_threshold",
    ),
    "no targets": ([datum({"weights": tensor([1.0] * 8)})], "cross_entropy", None, "target_tokens"),
    "short targets": ([datum({"target_tokens": tensor(TOKENS[1:-1], "int64")})], "cross_entropy", None, "7"),
    "long weights": ([datum({"target_tokens": TARGETS, "weights": tensor([1.0] * 11)})], "cross_entropy", None, "11"),
    "NaN weight": (
        [datum({"target_tokens": TARGETS, "weights": tensor([1.0] * 7 + [NAN])})],
        "cross_entropy",
        None,
        "weights",
    ),
    "infinite advantage": (
        [rl_datum(TOKENS, [-1.0] * 8, [float("inf")] * 8)],
        "importance_sampling",
        None,
        "advantages",
    ),
    "no logprobs": (
        [datum({"target_tokens": TARGETS, "advantages": tensor([1.0] * 8)})],
        "importance_sampling",
        None,
        "logprobs",
    ),
    "token beyond the vocabulary": ([sequence_datum([5, VOCAB, 7])], "cross_entropy", None, str(VOCAB)),
    "target beyond the vocabulary": ([sequence_datum([5, 6, 99999])], "cross_entropy", None, "99999"),
    "negative token": ([sequence_datum([5, -3, 7])], "cross_entropy", None, "-3"),
    "empty input": ([datum({"target_tokens": tensor([], "int64", [0])}, [])], "cross_entropy", None, "empty|token"),
    "too long": ([random_datum(1, 40961)], "cross_entropy", None, "40961"),
    "no spans": ([rl_datum(TOKENS, [-1.0] * 8, [1.0] * 8)], "stable_reinforce", None, "span|provenance"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_training_input(healthy, case):
    data, loss_fn, config, named = WRONG[case]
    with pytest.raises(tinker.RequestFailedError, match=named) as caught:
        healthy.forward_backward(data, loss_fn=loss_fn, loss_fn_config=config).result()
    assert caught.value.category == "user"


def test_one_wrong_datum_leaves_no_gradient(service):
    losses = []
    for spoil in (False, True):
        client = service.create_lora_training_client(base_model=LLAMA, rank=4, seed=2).result()
        if spoil:
            with pytest.raises(tinker.RequestFailedError):
                client.forward_backward([random_datum(9, 30), sequence_datum([5, VOCAB, 7])], "cross_entropy").result()
        losses.append([train_step(client, [random_datum(1, 12)]) for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rank", [0, 3, 257, 512, -1])
def test_wrong_rank(service, rank):
    with pytest.raises(tinker.TinkerError, match=str(rank)):
        service.create_lora_training_client(base_model=LLAMA, rank=rank).result()
    assert service.create_lora_training_client(base_model=LLAMA, rank=256).result().model_id


def test_nothing_to_train(server, service):
    """The SDK itself insists on one of the three, so the request goes out below it."""
    session = service.create_lora_training_client(base_model=LLAMA, rank=4).result().model_id.split(":")[0]
    config = {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}
    body = {"session_id": session, "model_seq_id": 1, "base_model": LLAMA, "lora_config": config}
    status, answer = server.post("create_model", body)
    assert status == 400 and "train_" in answer["detail"]


def test_unknown_base_model_names_those_served(service):
    with pytest.raises(tinker.TinkerError, match=LLAMA):
        service.create_lora_training_client(base_model="no/such-model", rank=4).result()
    with pytest.raises(tinker.TinkerError, match="no/such-model"):
        service.create_sampling_client(base_model="no/such-model").result()


@pytest.mark.parametrize("path", ["tinker://nobody:train:0/weights/x", "tinker://short", "tinker://a/b/c"])
@pytest.mark.filterwarnings("ignore")
def test_unknown_paths_are_named(service, healthy, path):
    calls = (
        lambda: service.create_training_client_from_state(path),
        lambda: service.create_training_client_from_state_with_optimizer(path),
        lambda: healthy.load_state(path),
        lambda: service.create_sampling_client(model_path=path.replace("/weights/", "/sampler_weights/")),
    )
    for call in calls:
        with pytest.raises((tinker.TinkerError, ValueError), match=path.replace("/weights/", "/(sampler_)?weights/")):
            call().result()


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "x" * 300])
def test_wrong_checkpoint_names(healthy, name):
    for save in (healthy.save_state, healthy.save_weights_for_sampler):
        with pytest.raises(tinker.RequestFailedError, match=re.escape(f'"{name}'[:100])):
            save(name).result()


def test_wrong_ttl(healthy):
    with pytest.raises(tinker.RequestFailedError, match="60"):
        healthy.save_state("ttl", ttl_seconds=60).result()


WRONG_SAMPLES = {
    "temperature": (dict(temperature=-1.0), [5], "temperature"),
    "top_p": (dict(top_p=1.5), [5], "top_p"),
    "top_k": (dict(top_k=-7), [5], "top_k"),
    "max_tokens": (dict(max_tokens=0), [5], "max_tokens"),
    "token": (dict(max_tokens=1), [VOCAB], str(VOCAB)),
    "empty prompt": (dict(max_tokens=1), [], "prompt"),
    "too long": (dict(max_tokens=1), [5] * 40961, "40961|40960"),
    "stop token": (dict(max_tokens=1, stop=[VOCAB + 5]), [5], str(VOCAB + 5)),
}


@pytest.mark.parametrize("case", WRONG_SAMPLES)
def test_wrong_sampling_input(service, case):
    params, prompt, named = WRONG_SAMPLES[case]
    sampler = service.create_sampling_client(base_model=LLAMA)
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match=named):
        sampler.sample(types.ModelInput.from_ints(prompt), 1, types.SamplingParams(**params)).result()
    good = sampler.sample(types.ModelInput.from_ints([5]), 1, types.SamplingParams(max_tokens=2, stop=[])).result()
    assert len(good.sequences[0].tokens) == 2


def test_too_many_samples(service):
    sampler = service.create_sampling_client(base_model=LLAMA)
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match="num_samples"):
        sampler.sample(types.ModelInput.from_ints([5]), 0, types.SamplingParams(max_tokens=1)).result()


# ---- below the SDK -------------------------------------------------------------------------------------------------


def message(model_id: str, seq_id: int) -> "wire.ForwardBackwardRequest":
    request = wire.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    item = request.data.add()
    item.model_input.add().encoded_text.tokens = np.array(TOKENS[:-1], "<i4").tobytes()
    targets = item.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = np.array(TOKENS[1:], "<i8").tobytes(), wire.DTYPE_INT64
    targets.shape.append(len(TOKENS) - 1)
    return request


def post(server, body: bytes, encoding: str | None = None, path="forward_backward", kind="application/x-protobuf"):
    headers = {"Content-Type": kind, **({"Content-Encoding": encoding} if encoding else {})}
    return server.request("POST", path, body, headers)


def retrieve(server, request_id: str):
    return server.post("retrieve_future", {"request_id": request_id, "allow_metadata_only": False})


@pytest.fixture
def model(service):
    return service.create_lora_training_client(base_model=LLAMA, rank=4).result().model_id


def test_plain_and_compressed_bodies_are_accepted(server, model):
    assert post(server, message(model, 1).SerializeToString())[0] == 200
    assert post(server, zstandard.compress(message(model, 2).SerializeToString()), "zstd")[0] == 200


REFUSED = {
    "truncated protobuf": (lambda m: m.SerializeToString()[:-5], None, "truncated or damaged", True),
    "not protobuf": (lambda m: b"\xff" * 64, None, "truncated or damaged", False),
    "truncated zstd": (lambda m: zstandard.compress(m.SerializeToString())[:-6], "zstd", "zstd", False),
    "not zstd": (lambda m: m.SerializeToString(), "zstd", "zstd", False),
    "unknown encoding": (lambda m: m.SerializeToString(), "br", "br", True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_bodies_are_400_and_the_next_call_works(server, model, case):
    spoil, encoding, named, number_used = REFUSED[case]
    status, body = post(server, spoil(message(model, 1)), encoding)
    assert status == 400 and re.search(named, body["detail"]), body
    # Where the number could be read it is used up; where not, the client's number is still missing.
    status, body = post(server, message(model, 1).SerializeToString())
    assert status == (400 if number_used else 200), body
    status, body = post(server, message(model, 2).SerializeToString())
    assert status == 200 and retrieve(server, body["request_id"])[0] == 200


def test_a_refused_number_is_consumed(server, model):
    """A body cut after its number: the client goes on with the next one, and must not wait for ever."""
    assert post(server, message(model, 1).SerializeToString()[:-5])[0] == 400
    status, body = post(server, message(model, 2).SerializeToString())
    assert status == 200
    assert retrieve(server, body["request_id"])[0] == 200


def test_zstd_bomb_within_bounded_memory(make_server, connect):
    server = make_server("bomb", None, "--max-decoded-bytes", "8000000")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4).result()
    losses = [train_step(client, [random_datum(1, 20)])]
    before = peak_bytes(server)
    status, body = post(server, zstandard.compress(b"\0" * (1 << 30)), "zstd")
    assert status == 400 and "8000000" in body["detail"]
    assert peak_bytes(server) - before < 64 << 20
    losses.append(train_step(client, [random_datum(1, 20)]))
    assert losses[1] < losses[0]


def peak_bytes(server) -> int:
    """VmHWM of the server, which the launcher has become."""
    status = open(f"/proc/{server.process.pid}/status").read()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


@pytest.mark.parametrize("kind, limit", [("decoded", "--max-decoded-bytes"), ("sent", "--max-body-bytes")])
def test_oversized_bodies_reach_the_user_as_a_clear_error(make_server, connect, kind, limit):
    """Also where the answer comes while most of the body is still on its way."""
    server = make_server(f"oversized-{kind}", None, limit, "100000")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4).result()
    losses = [train_step(client, [random_datum(1, 20)])]
    rows, width = 900, 1000
    noise = np.random.default_rng(0).normal(size=rows * width)
    huge = types.Datum(
        model_input=types.ModelInput.from_ints(random_tokens(1, rows)),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[5] * (rows * width), dtype="int64", shape=[rows, width]),
            "weights": types.TensorData(data=noise.tolist(), dtype="float32", shape=[rows, width]),
        },
    )
    with pytest.raises(tinker.BadRequestError, match="100000"):
        client.forward_backward([huge], loss_fn="cross_entropy").result(timeout=60)
    losses.append(train_step(client, [random_datum(1, 20)]))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "path, body, status, named",
    [
        ("create_session", b"{", 400, "no JSON.*byte 1"),
        ("create_session", b'{"tags": 5}', 400, "tags.*5"),
        ("create_model", b'{"session_id": 5}', 400, "base_model"),
        ("optim_step", b"[]", 400, "object.*array"),
        ("optim_step", b'{"model_id": "m"}', 400, "seq_id"),
        ("optim_step", b'{"model_id": "nobody:train:0", "seq_id": 1}', 404, "nobody:train:0"),
        ("save_weights", b'{"model_id": "nobody:train:0", "seq_id": 1, "path": "x"}', 404, "nobody:train:0"),
        ("get_info", b'{"model_id": "nobody:train:0"}', 404, "nobody:train:0"),
        ("weights_info", b'{"tinker_path": "tinker://nobody:train:0/weights/x"}', 404, "tinker://nobody:train:0/weights/x"),
        ("asample", b'{"prompt": "text"}', 400, "sampling_session_id"),
        ("asample", json.dumps({"sampling_session_id": "x" * 100000}).encode(), 400, "seq_id"),
        ("asample", b'{"sampling_session_id": "nobody:sample:0", "seq_id": 1}', 404, "nobody:sample:0"),
        ("retrieve_future", b"nothing", 400, "no JSON.*byte 0"),
        ("retrieve_future", b'{"request_id": "no-such-request"}', 404, "no-such-request"),
        ("create_session", b"[" * 100000, 400, "too deep"),
    ],
)
def test_broken_and_wrong_json_is_named(server, path, body, status, named):
    found, answer = post(server, body, path=path, kind="application/json")
    assert found == status and re.search(named, answer["detail"]), answer


def test_an_unknown_model_is_named(server):
    status, answer = post(server, message("nobody:train:0", 1).SerializeToString())
    assert status == 404 and "nobody:train:0" in answer["detail"]


def test_resent_request_gets_the_same_answer(server, model):
    body = message(model, 1).SerializeToString()
    first, again = post(server, body), post(server, body)
    assert first == again
    changed = message(model, 1)
    changed.loss_fn = "ppo"
    assert post(server, changed.SerializeToString())[0] == 400


def test_gap_is_parked_until_it_closes(server, model):
    later = post(server, message(model, 2).SerializeToString())
    assert later[0] == 200
    assert post(server, message(model, 1).SerializeToString())[0] == 200
    assert retrieve(server, later[1]["request_id"])[0] == 200
