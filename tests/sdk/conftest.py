import os

import pytest
import tinker

import models
from client_exit import pytest_sessionfinish, pytest_unconfigure  # noqa: F401
from server import Server

LLAMA = "test/tiny-llama"
QWEN = "test/tiny-qwen3"

os.environ["NO_PROXY"] = ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY", "")]))
os.environ.setdefault("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return models.write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    return models.write_model(tmp_path_factory.mktemp("qwen3"), "qwen3", head_dim=32, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, tiny_llama, tiny_qwen):
    """One server for every test that neither stops nor kills it."""
    server = Server({LLAMA: tiny_llama, QWEN: tiny_qwen}, tmp_path_factory.mktemp("shared") / "data").start()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server):
    assert shared_server.process.poll() is None, f"the shared server died:\n{shared_server.log_tail()}"
    return shared_server


@pytest.fixture
def make_server(tmp_path, tiny_llama):
    """Servers of a test's own, on the tiny Llama unless models are given."""
    started = []

    def make(name="data", served=None, *options):
        server = Server(served or {LLAMA: tiny_llama}, tmp_path / name, *options)
        started.append(server)
        return server.start()

    yield make
    for server in started:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture
def connect():
    """connect(server) → a ServiceClient that is closed with the test."""
    services = []

    def make(server, **options) -> tinker.ServiceClient:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-test", **options)
        services.append(service)
        return service

    yield make
    for service in services:
        service.close("success")  # without waiting: the test may have ended its server


@pytest.fixture
def service(server, connect):
    return connect(server)


@pytest.fixture
def client(service):
    """A fresh adapter of rank 8 on the tiny Llama."""
    return service.create_lora_training_client(base_model=LLAMA, rank=8, seed=1).result()
