"""Sessions, capabilities, models, tokenizers, health, and the command itself."""

import subprocess
import sys
import time

import pytest
import tinker
from tinker.lib.telemetry import Telemetry

from conftest import LLAMA, QWEN
from datums import random_datum, train_step
from server import ROOT


def test_capabilities_name_the_served_models(service):
    named = {model.model_name: model for model in service.get_server_capabilities().supported_models}
    assert set(named) >= {LLAMA, QWEN}
    assert named[LLAMA].max_context_length > 1000


def test_info_describes_the_model(client):
    info = client.get_info()
    assert info.model_data.model_name == LLAMA
    assert info.is_lora and info.lora_rank == 8


def test_tokenizer_comes_from_the_served_directory(client):
    tokenizer = client.get_tokenizer()
    text = "The quick brown fox — 東京"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_model_ids_are_numbered_within_a_session(service):
    first = service.create_lora_training_client(base_model=LLAMA, rank=4).result()
    second = service.create_lora_training_client(base_model=QWEN, rank=4).result()
    session, kind, number = first.model_id.rsplit(":", 2)
    assert (kind, number) == ("train", "0")
    assert second.model_id == f"{session}:train:1"


def test_equal_seeds_give_equal_adapters(service):
    losses = []
    for seed in (5, 5, 6):
        made = service.create_lora_training_client(base_model=LLAMA, rank=4, seed=seed).result()
        losses.append([train_step(made, [random_datum(1, 20)]) for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("groups", [{"train_mlp": False}, {"train_attn": False, "train_unembed": False}])
def test_layer_groups_can_be_left_out(service, groups):
    made = service.create_lora_training_client(base_model=LLAMA, rank=4, **groups).result()
    losses = [train_step(made, [random_datum(2, 16)]) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_finished_session_refuses_work(server, connect):
    service = connect(server)
    client = service.create_lora_training_client(base_model=LLAMA, rank=4).result()
    session = client.model_id.split(":")[0]
    service.close("success").result()
    assert server.post("session_heartbeat", {"session_id": session, "type": "session_heartbeat"})[0] == 410
    other = connect(server)
    assert other.create_lora_training_client(base_model=LLAMA, rank=4).result().model_id


def test_session_creation_is_idempotent(server):
    body = b'{"tags":[],"user_metadata":{},"sdk_version":"0.38.0","type":"create_session"}'
    first = server.request("POST", "create_session", body, {"X-Idempotency-Key": "same"})
    second = server.request("POST", "create_session", body, {"X-Idempotency-Key": "same"})
    other = server.request("POST", "create_session", body, {"X-Idempotency-Key": "other"})
    assert first[0] == 200 and first[1]["session_id"] == second[1]["session_id"] != other[1]["session_id"]


def test_health_and_unknown_paths(server):
    assert server.request("GET", "healthz")[0] == 200
    status, body = server.request("GET", "no/such/endpoint")
    assert status == 404 and "no/such/endpoint" in str(body)
    assert server.request("DELETE", "healthz")[0] == 405
    assert server.post("telemetry", {"events": [], "session_id": "x", "platform": "p", "sdk_version": "0.38.0"}) == (
        200,
        {"status": "accepted"},
    )


@pytest.mark.parametrize("sessionful", [True, False])
def test_telemetry_of_the_sdk_is_accepted(server, connect, monkeypatch, caplog, sessionful):
    answers = []
    send = Telemetry._send_batch

    async def send_and_note(self, batch):
        answers.append(await send(self, batch))
        return answers[-1]

    monkeypatch.setattr(Telemetry, "_send_batch", send_and_note)
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    service = connect(server)
    if sessionful:
        client = service.create_lora_training_client(base_model=LLAMA, rank=4).result()
        with pytest.raises(tinker.RequestFailedError):
            client.forward_backward([random_datum(1, 8)], "no_such_loss").result()
    else:
        with pytest.raises(tinker.NotFoundError):
            service.create_rest_client().get_training_run("nobody:train:0").result()
    service.close("success").result()
    assert [answer.status for answer in answers] == ["accepted"] * len(answers) and (answers or not sessionful)
    assert "telemetry" not in caplog.text.lower()


def test_two_aliases_of_one_directory_share_a_worker(make_server, connect, tiny_llama):
    server = make_server("aliases", {"a/one": tiny_llama, "b/two": tiny_llama})
    assert len(server.workers()) == 1
    service = connect(server)
    clients = [service.create_lora_training_client(base_model=name, rank=4, seed=3).result() for name in server.models]
    assert train_step(clients[0], [random_datum(1, 8)]) == train_step(clients[1], [random_datum(1, 8)])


def test_control_c_ends_cleanly(make_server):
    server = make_server("stopped")
    workers = server.workers()
    assert server.stop() == 0
    deadline = time.monotonic() + 5
    while any(worker.is_running() and worker.status() != "zombie" for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its server"
        time.sleep(0.05)


def run_launcher(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hosted_tinker", *arguments],
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_help_names_every_option_and_version_is_printed():
    text = run_launcher("serve", "--help").stdout
    for option in "base-model host port data-dir model-alias backend backend-config max-seq-len snapshot-seconds".split():
        assert f"--{option}" in text
    assert run_launcher("--version").stdout.startswith("hosted-tinker 0.")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--port", "70000"), "70000"),
        (("--snapshot-seconds", "nan"), "nan"),
        (("--backend", "nonsense"), "nonsense"),
        (("--backend-config", "{"), "'{'"),
        (("--backend-config", "[1]"), "[1]"),
        (("--model-alias", "nodirectory"), "nodirectory"),
        (("--base-model", "/no/such/dir"), "/no/such/dir"),
    ],
)
def test_wrong_options_are_named(arguments, named):
    done = run_launcher("serve", *arguments)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options, named",
    [
        (("--backend-config", '{"micro_batch_tokenz": 5}'), "micro_batch_tokenz"),
        (("--backend-config", '{"recompute": "sometimes"}'), "sometimes"),
        (("--backend-config", '{"device": "tpu"}'), "auto, cpu, cuda"),
    ],
)
def test_wrong_backend_config_ends_the_server(make_server, options, named):
    with pytest.raises(RuntimeError, match=named):
        make_server("config", None, *options)


def test_a_cuda_device_that_is_missing_ends_the_server(make_server, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="device cuda cannot be used: .*NVIDIA driver"):
        make_server("cuda", None, "--backend-config", '{"device": "cuda"}')


def test_max_seq_len_is_enforced(make_server, connect):
    service = connect(make_server("short", None, "--max-seq-len", "32"))
    client = service.create_lora_training_client(base_model=LLAMA, rank=4).result()
    train_step(client, [random_datum(1, 32)])
    with pytest.raises(tinker.RequestFailedError, match="33"):
        client.forward_backward([random_datum(1, 33)], loss_fn="cross_entropy").result()
