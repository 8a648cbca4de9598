"""save, load, list, TTL, delete; what a checkpoint contains; and that training continues from it unchanged."""

import json
import struct

import pytest
import tinker
from tinker import types

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


def test_names_are_not_reused_silently(client):
    client.save_state("name", user_metadata={"step": "1"}).result()
    with pytest.raises(tinker.RequestFailedError, match="name"):
        client.save_state("name").result()
    train_step(client, DATA)
    client.save_state("name", overwrite=True, user_metadata={"step": "2"}).result()


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
