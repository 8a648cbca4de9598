"""kill -9 of the worker and of the server: nothing acknowledged is lost, nothing is applied twice, the bits stay."""

import time

import numpy as np
import pytest
import tinker

from conftest import LLAMA, QWEN
from datums import adam, logprobs_of, random_datum, random_tokens, sample_tokens, sequence_datum, train_step
from server import Server

STEPS = 6


def restart(server):
    server.kill()
    server.start()


def shared_run(server, connect, kill_at=(), kill=Server.kill_worker):
    """Two adapters whose calls are queued behind a third's long one, so that they share micro-batches in every run.
    Returns all losses and logprobs as bytes."""
    service = connect(server)
    first, second, blocker = (
        service.create_lora_training_client(base_model=LLAMA, rank=rank, seed=rank).result() for rank in (4, 16, 1)
    )
    seen = []
    for step in range(STEPS):
        long = blocker.forward_backward([random_datum(1, 2048)] * 2, loss_fn="cross_entropy")
        calls = [
            client.forward_backward([random_datum(100 * step + n, 10 + 3 * n) for n in range(3)], loss_fn="cross_entropy")
            for client in (first, second)
        ]
        if step in kill_at:
            time.sleep(0.05)
            kill(server)
        results = [call.result() for call in calls]
        long.result()
        for client in (first, second):
            client.optim_step(adam()).result()
        for result in results:
            seen.append(np.float64(result.metrics["loss:sum"]).tobytes())
            seen += [logprobs.tobytes() for logprobs in logprobs_of(result)]
    return seen


def test_worker_killed_in_mid_run_gives_the_same_bits(make_server, connect):
    undisturbed = shared_run(make_server("calm"), connect)
    for step in (0, 3):
        assert shared_run(make_server(f"killed-{step}"), connect, kill_at=[step]) == undisturbed


def snapshots_made(server):
    """By the running server: the last one's directory carries its number."""
    return max((int(cut.name.rsplit("-", 1)[1]) for cut in (server.data_dir / "snapshots").glob("*/*-*")), default=0)


@pytest.mark.parametrize("kill", [Server.kill_worker, restart], ids=["worker", "server"])
def test_killed_again_and_again_between_snapshots(make_server, connect, kill):
    """A cut after every bit of compute: each death falls between two of them, or into one."""
    made = []

    def count_and_kill(server):
        made.append(snapshots_made(server))
        kill(server)

    undisturbed = shared_run(make_server("calm"), connect)
    server = make_server("cuts", None, "--snapshot-seconds", "0.02")
    assert shared_run(server, connect, kill_at=[2, 3, 5], kill=count_and_kill) == undisturbed
    assert made[0] >= 2 and snapshots_made(server) >= 1


def test_adapters_come_back_from_a_snapshot_alone(make_server, connect):
    """Moments, gradients that wait for their step, the step count and sampler versions, with no replay behind them."""
    server = make_server("cut", None, "--snapshot-seconds", "0.001")
    service = connect(server)
    data = [random_datum(1, 20)]
    curves = []
    for die in (False, True):
        client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
        curve = [train_step(client, data) for _ in range(3)]
        sampler = client.save_weights_and_get_sampling_client().result()
        client.forward_backward([random_datum(2, 20)], loss_fn="cross_entropy").result()
        if die:
            wait_for_a_cut(server, service)
            restart(server)
        curve.append(client.optim_step(adam()).result().metrics["grad_norm"])
        curve += [train_step(client, data) for _ in range(2)]
        curves.append(curve + [sample_tokens(sampler, list(range(10, 30)), seed=1, max_tokens=16, stop=[])])
    assert curves[0] == curves[1]


def wait_for_a_cut(server, service):
    """A snapshot begun after this call."""
    made = snapshots_made(server)
    other = service.create_lora_training_client(base_model=LLAMA, rank=1, seed=2).result()
    for _ in range(200):
        train_step(other, [random_datum(1, 200)])
        if snapshots_made(server) >= made + 2:
            return
        time.sleep(0.05)
    raise AssertionError("no snapshot was made")


def test_a_base_model_missing_after_a_restart(make_server, connect, tiny_llama, tiny_qwen):
    """Calls of its models say so; the others go on; when it is back, so are they."""
    both = {LLAMA: tiny_llama, QWEN: tiny_qwen}
    server = make_server("bases", both)
    service = connect(server)
    data = [random_datum(1, 20)]

    def make():
        return [service.create_lora_training_client(base_model=base, rank=4, seed=2).result() for base in both]

    expected = [[train_step(client, data) for _ in range(4)] for client in make()]
    clients = make()
    curves = [[train_step(client, data) for _ in range(2)] for client in clients]
    path = clients[1].save_weights_for_sampler("kept").result().path
    server.stop()
    server.models = {LLAMA: tiny_llama}
    server.start()
    curves[0].append(train_step(clients[0], data))
    with pytest.raises(tinker.TinkerError, match=QWEN):
        clients[1].forward_backward(data, loss_fn="cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match=QWEN):
        service.create_sampling_client(model_path=path).result()
    with pytest.raises(tinker.TinkerError, match=QWEN):
        service.create_lora_training_client(base_model=QWEN, rank=4).result()
    server.stop()
    server.models = both
    server.start()
    curves[0].append(train_step(clients[0], data))
    curves[1] += [train_step(clients[1], data) for _ in range(2)]
    assert curves == expected


def test_what_was_listed_is_listed_after_a_restart(make_server, connect):
    server = make_server("lists")
    service = connect(server, user_metadata={"purpose": "test"})
    client = service.create_lora_training_client(base_model=LLAMA, rank=4, user_metadata={"of": "run"}).result()
    train_step(client, [random_datum(1, 20)])
    client.save_state("kept", user_metadata={"step": "1"}).result()
    client.save_weights_for_sampler("dying", ttl_seconds=7200).result()
    session = client.model_id.split(":")[0]
    paths = ["training_runs", f"training_runs/{client.model_id}/checkpoints", "checkpoints", f"sessions/{session}"]

    def listed():
        answers = [server.request("GET", path) for path in paths]
        for run in answers[0][1]["training_runs"]:
            del run["last_request_time"]  # written every few seconds
        return answers

    before = listed()
    assert [status for status, _ in before] == [200] * 4
    for text, answer in zip(("of", "dying", "step", "purpose"), before):
        assert text in str(answer)
    restart(server)
    assert listed() == before


def test_worker_killed_between_gradient_and_step(make_server, connect):
    server = make_server("pending")
    curves = []
    for kill in (False, True):
        client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
        curve = [train_step(client, [random_datum(1, 20)])]
        client.forward_backward([random_datum(2, 20)], loss_fn="cross_entropy").result()
        if kill:
            server.kill_worker()
        client.optim_step(adam()).result()
        curves.append(curve + [train_step(client, [random_datum(1, 20)]) for _ in range(2)])
    assert curves[0] == curves[1]


def test_a_loaded_checkpoint_may_be_deleted(make_server, connect):
    server = make_server("loaded")
    service = connect(server)
    data = [random_datum(1, 20)]
    client = service.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    train_step(client, data)
    path = client.save_state("early").result().path
    train_step(client, data)
    expected = [train_step(client, data) for _ in range(2)]
    client.load_state_with_optimizer(path).result()
    train_step(client, data)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    train_step(resumed, data)
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
    assert not list((server.data_dir / "checkpoints").rglob("*.safetensors"))
    server.kill_worker()
    assert [train_step(client, data) for _ in range(2)] == expected
    server.kill()
    server.start()
    assert [train_step(resumed, data) for _ in range(2)] == expected


def test_samplers_survive_their_worker(make_server, connect):
    server = make_server("sampler")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    train_step(client, [random_datum(1, 20)])
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = list(range(10, 30))
    expected = sample_tokens(sampler, prompt, seed=1, max_tokens=16, stop=[])
    server.kill_worker()
    assert sample_tokens(sampler, prompt, seed=1, max_tokens=16, stop=[]) == expected


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_server_restarts_and_the_same_client_goes_on(make_server, connect, how):
    server = make_server(f"restart-{how}")
    undisturbed = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    expected = [train_step(undisturbed, [random_datum(1, 20)]) for _ in range(5)]
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    curve = [train_step(client, [random_datum(1, 20)]) for _ in range(2)]
    getattr(server, how)()
    server.start()
    curve += [train_step(client, [random_datum(1, 20)]) for _ in range(3)]
    assert curve == expected


def test_server_killed_with_a_request_in_flight(make_server, connect):
    server = make_server("flight")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    data = [random_datum(n, 1000) for n in range(6)]
    expected = client.forward_backward(data, loss_fn="cross_entropy").result().metrics["loss:sum"]
    pending = client.forward_backward(data, loss_fn="cross_entropy")
    time.sleep(0.1)
    server.kill()
    server.start()
    assert pending.result().metrics["loss:sum"] == expected
    norm = client.optim_step(adam()).result().metrics["grad_norm"]
    other = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    for _ in range(2):
        other.forward_backward(data, loss_fn="cross_entropy")
    assert other.optim_step(adam()).result().metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_finished_results_are_served_after_a_restart(make_server, connect):
    server = make_server("results")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=4, seed=2).result()
    body = {"model_id": client.model_id, "seq_id": 1, "adam_params": {"learning_rate": 0.01}, "type": "optim_step"}
    request_id = server.post("optim_step", body)[1]["request_id"]
    poll = {"request_id": request_id, "allow_metadata_only": False}
    before = server.post("retrieve_future", poll)
    server.kill()
    server.start()
    assert server.post("retrieve_future", poll) == before
    assert server.post("optim_step", body)[1]["request_id"] == request_id


def test_orphaned_workers_end_by_themselves(make_server):
    server = make_server("orphan")
    workers = server.workers()
    server.kill()
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != "zombie" for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its killed server"
        time.sleep(0.05)


def test_several_workers_deaths_in_a_row(make_server, connect):
    server = make_server("often")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    expected = [train_step(client, [random_datum(1, 20)]) for _ in range(4)]
    again = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    curve = []
    for _ in range(4):
        server.kill_worker()
        curve.append(train_step(again, [random_datum(1, 20)]))
    assert curve == expected


def test_a_refused_step_stays_refused(make_server, connect):
    """A step with a gradient that is not finite clears it: a recovery must clear it again."""
    server = make_server("refused")
    client = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    data = [random_datum(1, 20)]
    train_step(client, data)
    client.forward_backward([sequence_datum(random_tokens(1, 21), [3e38] * 20)], loss_fn="cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="not finite"):
        client.optim_step(adam()).result()
    for _ in range(2):
        train_step(client, data)
    before = [logprobs.tobytes() for logprobs in logprobs_of(client.forward(data, loss_fn="cross_entropy").result())]
    server.kill_worker()
    after = [logprobs.tobytes() for logprobs in logprobs_of(client.forward(data, loss_fn="cross_entropy").result())]
    assert after == before


def test_a_session_may_end_during_a_replay(make_server, connect):
    """Its half-executed request belongs to micro-batches of others: they must not wait for it for ever."""
    server = make_server("ended")
    leaving = connect(server)
    client = leaving.create_lora_training_client(base_model=LLAMA, rank=8, seed=2).result()
    other = connect(server).create_lora_training_client(base_model=LLAMA, rank=8, seed=3).result()
    for seed in range(40):
        client.forward_backward([random_datum(seed, 1000)], loss_fn="cross_entropy")
    client.forward_backward([random_datum(seed, 1000) for seed in range(8)], loss_fn="cross_entropy")
    train_step(other, [random_datum(1, 20)])
    server.kill_worker()
    leaving.close("success")
    started = time.monotonic()
    train_step(other, [random_datum(1, 20)])
    assert time.monotonic() - started < 60
