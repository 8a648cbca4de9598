"""What an operator does and sees: limits that clients wait out, a data directory that moves, the figures of healthz."""

from tinker import types

from conftest import LLAMA
from datums import adam, logprobs_of, random_datum, random_tokens, sample_tokens, train_step


def test_full_queues_make_the_client_wait_not_fail(make_server, connect):
    server = make_server("data", None, "--max-model-requests", "3")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4).result()
    calls = [client.forward_backward([random_datum(n, 512)], loss_fn="cross_entropy") for n in range(8)]
    assert all(len(call.result().loss_fn_outputs) == 1 for call in calls)
    client.optim_step(adam()).result()


def test_the_data_directory_may_be_moved(make_server, connect, tmp_path):
    server = make_server()
    service = connect(server)
    client = service.create_lora_training_client(base_model=LLAMA, rank=4, seed=3).result()
    train_step(client, [random_datum(1, 40)])
    path = client.save_state("before").result().path
    train_step(client, [random_datum(2, 40)])
    client.load_state(path).result()
    ephemeral = client.save_weights_and_get_sampling_client()
    weights = client.save_weights_for_sampler("kept").result().path
    prompt = random_tokens(5, 12)
    greedy = dict(max_tokens=5, temperature=0.0, stop=[])
    wanted = sample_tokens(ephemeral, prompt, **greedy)
    expected = logprobs_of(client.forward([random_datum(3, 30)], loss_fn="cross_entropy").result())

    server.stop()
    old = server.data_dir
    server.data_dir = tmp_path / "elsewhere"
    old.rename(server.data_dir)
    server.start()

    now = logprobs_of(client.forward([random_datum(3, 30)], loss_fn="cross_entropy").result())
    assert [a.tobytes() for a in now] == [a.tobytes() for a in expected]
    assert sample_tokens(ephemeral, prompt, **greedy) == wanted
    assert sample_tokens(service.create_sampling_client(model_path=weights), prompt, **greedy) == wanted
    resumed = service.create_training_client_from_state(path)
    train_step(resumed, [random_datum(2, 40)])
    train_step(client, [random_datum(4, 40)])
    client.save_state("after").result()
    server.kill()  # what is repeated now was written before and after the move
    server.start()
    assert sample_tokens(client.save_weights_and_get_sampling_client(), prompt, **greedy)
    assert not old.exists()


def test_healthz_tells_the_workers_counters(make_server, connect):
    server = make_server()
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4).result()
    train_step(client, [random_datum(1, 40)])
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(types.ModelInput.from_ints([5, 6, 7]), 1, types.SamplingParams(max_tokens=4)).result()
    (model,) = server.request("GET", "healthz")[1]["models"]
    assert model["memory_plan"]
    assert model["peak_rss_bytes"] >= model["rss_bytes"] > 10_000_000
    counters = model["counters"]
    assert counters["micro_batches"] >= 1
    assert counters["decode_steps"] >= 1
    assert counters["cache_blocks_total"] >= counters["cache_blocks_free"] > 0
    assert counters["queued_training"] == 0
    assert model["snapshot_failures"] == 0
