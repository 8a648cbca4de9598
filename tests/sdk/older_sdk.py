"""A pytest plugin for test_older_clients.py: older clients, written to as today's is."""

from concurrent.futures import Future

import tinker


def _closed(self, reason: str) -> Future:
    done = Future()
    done.set_result(None)
    return done


# Creating a client gave the client itself, no future of it.
for client in (tinker.TrainingClient, tinker.SamplingClient):
    if not hasattr(client, "result"):
        client.result = lambda self, timeout=None: self
if not hasattr(tinker.ServiceClient, "close"):
    tinker.ServiceClient.close = _closed


def pytest_report_header() -> str:
    return f"tinker {tinker.__version__}"
