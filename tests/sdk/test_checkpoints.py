"""save, load, list, TTL, delete; what a checkpoint contains; and that training continues from it unchanged."""

import json
import sqlite3
import struct

import pytest
import tinker

from conftest import LLAMA, QWEN
from datums import random_datum, sample_tokens, train_step

DATA = [random_datum(1, 24)]


def files_of(server, path):
    """The checkpoint's directory, found in the data directory by its run and name."""
    name = path.rsplit("/", 1)[1]
    found = [
        file.parent
        for file in server.data_dir.rglob("adapter_model.safetensors")
        if file.parent.name == name or name in str(file.parent.relative_to(server.data_dir))
    ]
    assert len(found) == 1, found
    return found[0]


def test_state_continues_like_an_uninterrupted_run(service, client):
    for _ in range(3):
        train_step(client, DATA)
    path = client.save_state("three").result().path
    assert path == f"tinker://{client.model_id}/weights/three"
    expected = [train_step(client, DATA) for _ in range(4)]
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.model_id != client.model_id
    assert [train_step(resumed, DATA) for _ in range(4)] == expected


def test_weights_alone_start_a_fresh_optimizer(service, client):
    for _ in range(3):
        train_step(client, DATA)
    path = client.save_state("weights").result().path
    expected = [train_step(client, DATA) for _ in range(3)]
    fresh = service.create_training_client_from_state(path).result()
    curve = [train_step(fresh, DATA) for _ in range(3)]
    assert curve[0] == expected[0] and curve[2] != expected[2]


def test_state_loads_after_a_restart(make_server, connect):
    server = make_server("restarted")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=1).result()
    train_step(client, DATA)
    path = client.save_state("kept").result().path
    expected = [train_step(client, DATA) for _ in range(3)]
    assert server.stop() == 0
    server.start()
    resumed = connect(server).create_training_client_from_state_with_optimizer(path).result()
    assert [train_step(resumed, DATA) for _ in range(3)] == expected


@pytest.mark.filterwarnings("ignore")
def test_loading_into_an_existing_model(service, client):
    path = client.save_state("start").result().path
    first = train_step(client, DATA)
    train_step(client, DATA)
    client.load_state_with_optimizer(path).result()
    assert train_step(client, DATA) == first


def test_names_are_not_reused_silently(server, client):
    first = client.save_state("taken", user_metadata={"step": "1"}).result().path
    files = files_of(server, first)
    train_step(client, DATA)
    with pytest.raises(tinker.RequestFailedError, match="taken"):
        client.save_state("taken").result()
    assert files_of(server, first) == files


def test_overwriting_replaces_weights_and_metadata(service, client):
    path = client.save_state("rolling", user_metadata={"step": "0"}).result().path
    for _ in range(3):
        train_step(client, DATA)
    assert client.save_state("rolling", overwrite=True, user_metadata={"step": "3"}).result().path == path
    (listed,) = service.create_rest_client().list_checkpoints(client.model_id).result().checkpoints
    assert (listed.tinker_path, listed.user_metadata) == (path, {"step": "3"})
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert train_step(resumed, DATA) == train_step(client, DATA)


def test_lists_metadata_ttl_and_deletion(service, client):
    rest = service.create_rest_client()
    kept = client.save_state("kept", user_metadata={"note": "first"}).result().path
    dying = client.save_weights_for_sampler("dying", ttl_seconds=7200).result().path
    listed = {c.tinker_path: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert set(listed) == {kept, dying}
    assert listed[kept].checkpoint_id == "weights/kept" and listed[kept].checkpoint_type == "training"
    assert listed[kept].user_metadata == {"note": "first"} and listed[kept].size_bytes > 1000
    assert listed[kept].expires_at is None and listed[dying].expires_at is not None
    assert listed[dying].checkpoint_type == "sampler"
    rest.delete_checkpoint(client.model_id, "sampler_weights/dying").result()
    assert [c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints] == [kept]
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint(client.model_id, "sampler_weights/dying").result()
    with pytest.raises((tinker.NotFoundError, tinker.PermissionDeniedError)):
        service.create_sampling_client(model_path=dying).result()


def test_ttl_can_be_changed_and_removed(service, client):
    rest = service.create_rest_client()
    path = client.save_state("timed", ttl_seconds=7200).result().path

    def expires_at():
        (checkpoint,) = rest.list_checkpoints(client.model_id).result().checkpoints
        return checkpoint.expires_at

    first = expires_at()
    rest.set_checkpoint_ttl_from_tinker_path(path, 14400).result()
    assert (expires_at() - first).total_seconds() == pytest.approx(7200, abs=60)
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert expires_at() is None
    with pytest.raises(tinker.BadRequestError, match="5"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 5).result()


def test_an_expired_checkpoint_is_gone(make_server, connect):
    """The shortest TTL is an hour, so the hour is taken out of the server's records while it is down."""
    server = make_server("ttl")
    service = connect(server)
    client = service.create_lora_training_client(base_model=LLAMA, rank=4, seed=1).result()
    dead = client.save_state("dead", ttl_seconds=3600).result().path
    alive = client.save_state("alive", ttl_seconds=7200).result().path
    files = files_of(server, dead)
    server.stop()
    with sqlite3.connect(server.data_dir / "server.sqlite") as database:
        changed = database.execute("UPDATE checkpoints SET expires_ms = expires_ms - 3600000")
        assert changed.rowcount == 2
    database.close()
    server.start()
    listed = service.create_rest_client().list_checkpoints(client.model_id).result().checkpoints
    assert [checkpoint.tinker_path for checkpoint in listed] == [alive]
    with pytest.raises(tinker.NotFoundError, match=dead):
        service.create_training_client_from_state(dead).result()
    assert service.create_training_client_from_state(alive).result().model_id
    assert not files.exists()
    assert client.save_state("dead").result().path == dead
    train_step(client, DATA)


def test_training_runs_are_paged(service):
    rest = service.create_rest_client()
    clients = [service.create_lora_training_client(base_model=LLAMA, rank=r).result() for r in (1, 2, 4)]
    first = rest.list_training_runs(limit=2).result()
    second = rest.list_training_runs(limit=2, offset=2).result()
    assert first.cursor.total_count == second.cursor.total_count >= 3
    ids = [run.training_run_id for run in first.training_runs + second.training_runs]
    assert len(set(ids)) == len(ids) >= 3
    every = rest.list_training_runs(limit=1000).result().training_runs
    ranks = {run.training_run_id: run.lora_rank for run in every}
    assert [ranks[client.model_id] for client in clients] == [1, 2, 4]


@pytest.mark.parametrize("left_out", ["train_attn", "train_mlp", "train_unembed"])
def test_weights_info_tells_what_is_trained(service, left_out):
    client = service.create_lora_training_client(base_model=LLAMA, rank=4, **{left_out: False}).result()
    path = client.save_state("parts").result().path
    info = service.create_rest_client().get_weights_info_by_tinker_path(path).result()
    for part in ("train_attn", "train_mlp", "train_unembed"):
        assert getattr(info, part) == (part != left_out)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert train_step(resumed, DATA) == train_step(client, DATA)


def test_training_run_and_weights_info(service, client):
    rest = service.create_rest_client()
    path = client.save_state("info").result().path
    run = rest.get_training_run(client.model_id).result()
    assert (run.training_run_id, run.base_model, run.lora_rank) == (client.model_id, LLAMA, 8)
    assert run.last_checkpoint.tinker_path == path
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert info.base_model == LLAMA and info.is_lora and info.lora_rank == 8
    assert info.train_mlp and info.train_attn and info.train_unembed


def test_files_have_the_hosted_layout(server, client):
    train_step(client, DATA)
    directory = files_of(server, client.save_state("layout-of-files").result().path)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 32
    with (directory / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    prefix = "base_model.model.model."
    assert header[f"{prefix}layers.0.self_attn.q_proj.lora_A.weight"]["shape"] == [8, 64]
    assert header[f"{prefix}layers.1.mlp.down_proj.lora_B.weight"]["shape"] == [64, 8]
    assert header[f"{prefix}unembed_tokens.lora_B.weight"]["shape"] == [384, 8]
    assert len([name for name in header if name != "__metadata__"]) == 2 * (2 * 7 + 1)


def test_wrong_loads_are_clean_errors(service, client):
    state = client.save_state("kind").result().path
    run = client.model_id
    for path in (f"tinker://{run}/weights/missing", "tinker://nobody:train:0/weights/x", "tinker://short"):
        with pytest.raises((tinker.TinkerError, ValueError)):
            service.create_training_client_from_state(path).result()
    other = service.create_lora_training_client(base_model=QWEN, rank=4).result()
    with pytest.raises(tinker.RequestFailedError):
        other.load_state(state).result()
    train_step(other, DATA)
    train_step(client, DATA)


def test_sampler_from_a_checkpoint_after_a_restart(make_server, connect):
    server = make_server("samplers")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4, seed=1).result()
    train_step(client, DATA)
    path = client.save_weights_for_sampler("s").result().path
    prompt = list(range(10, 20))
    sampler = connect(server).create_sampling_client(model_path=path)
    expected = sample_tokens(sampler, prompt, seed=3)
    server.stop()
    server.start()
    assert sample_tokens(connect(server).create_sampling_client(model_path=path), prompt, seed=3) == expected
