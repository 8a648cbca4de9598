"""Several users at once: adapters of unequal rank over one base, results independent of who else is there."""

import threading

import pytest

from conftest import LLAMA, QWEN
from datums import adam, random_datum, sample_tokens, train_step

RANKS = (1, 8, 32)


def curve(client, seed, steps=6):
    return [train_step(client, [random_datum(seed, 20), random_datum(seed + 1, 7)]) for _ in range(steps)]


def test_three_adapters_of_unequal_rank_train_at_once(server, connect):
    alice, bob = connect(server), connect(server)
    owners = (alice, bob, bob)

    def make():
        return [o.create_lora_training_client(base_model=LLAMA, rank=r, seed=r).result() for o, r in zip(owners, RANKS)]

    alone = [curve(client, 10 * rank) for client, rank in zip(make(), RANKS)]
    together = [None] * 3
    clients = make()

    def run(index):
        together[index] = curve(clients[index], 10 * RANKS[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together):
        assert other == pytest.approx(one, rel=1e-4)
        assert other[-1] < other[0]


def test_queued_small_calls_share_micro_batches(make_server, connect):
    """3 adapters × 8 queued calls of a few tokens in at most half the micro-batches of serial execution."""
    server = make_server("merged")
    service = connect(server)
    clients = [service.create_lora_training_client(base_model=LLAMA, rank=rank, seed=1).result() for rank in RANKS]
    data = [[random_datum(index, 6)] for index in range(8)]
    serial = []
    for one in data:
        serial += [client.forward_backward(one, loss_fn="cross_entropy").result() for client in clients]
    assert server.micro_batches() == 24
    blocker = service.create_lora_training_client(base_model=LLAMA, rank=1, seed=1).result()
    before = server.micro_batches()
    # Runs alone first, so that the 24 calls are all queued when the worker looks again.
    long = blocker.forward_backward([random_datum(1, 2048)] * 4, loss_fn="cross_entropy")
    calls = [
        client.forward_backward(one, loss_fn="cross_entropy")
        for one in data
        for client in clients
    ]
    merged = [call.result() for call in calls]
    long.result()
    own = 4  # the blocker's four datums of the whole token budget
    assert 1 <= server.micro_batches() - before - own <= 12
    for one, other in zip(serial, merged):
        assert other.metrics["loss:sum"] == pytest.approx(one.metrics["loss:sum"], rel=1e-5)


def test_two_bases_serve_side_by_side(service):
    clients = [service.create_lora_training_client(base_model=base, rank=4, seed=1).result() for base in (LLAMA, QWEN)]
    pending = []
    for step in range(4):
        for client in clients:
            pending.append(client.forward_backward([random_datum(step, 16)], loss_fn="cross_entropy"))
            client.optim_step(adam())
    losses = [future.result().metrics["loss:sum"] for future in pending]
    assert losses[0::2] != losses[1::2]


def test_samplers_of_several_adapters_do_not_mix(service):
    prompt = list(range(20, 30))
    samplers, alone = [], []
    for rank in RANKS:
        client = service.create_lora_training_client(base_model=LLAMA, rank=rank, seed=rank).result()
        for _ in range(4):
            train_step(client, [random_datum(rank, 30)])
        samplers.append(client.save_weights_and_get_sampling_client().result())
        alone.append(sample_tokens(samplers[-1], prompt, seed=1, stop=[]))
    results = [None] * len(samplers)

    def run(index):
        results[index] = [sample_tokens(samplers[index], prompt, seed=1, stop=[]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(samplers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, many in zip(alone, results):
        assert all(tokens == one for tokens in many)
