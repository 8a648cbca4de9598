"""The sampling lane: requests take turns, a step each, oldest first when they begin."""

import collections

from hosted_tinker.pytorch_worker import protocol
from hosted_tinker.pytorch_worker.backend_config import BackendConfig
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError
from hosted_tinker.pytorch_worker.sampler import Generation
from hosted_tinker.pytorch_worker.versions import Versions

_MAX_CACHES = 8  # requests with a key/value cache at once


class SampleExecutor:
    def __init__(self, model: BaseModel, versions: Versions, config: BackendConfig, max_seq_len: int, send):
        self._model, self._versions, self._config = model, versions, config
        self._max_seq_len, self._send = max_seq_len, send
        self._table: list[bytes] | None = None
        self._table_known = False
        self._without_table: list = []  # samples with stop strings that wait for the table
        self._waiting: collections.deque = collections.deque()  # requests
        self._running: collections.OrderedDict[int, tuple] = collections.OrderedDict()  # id → (Generation, weights)
        self.steps = self.tokens = 0

    def push(self, request) -> None:
        if request.WhichOneof("body") == "drop_version":
            self._versions.drop(request.drop_version.version)
            self._send(protocol.done(request.id, protocol.Ack()))
        elif request.sample.params.stop_strings and not self._table_known:
            self._without_table.append(request)
        else:
            self._waiting.append(request)

    def set_token_table(self, table: list[bytes] | None) -> None:
        """None: there is none. Samples with stop strings wait for this call."""
        self._table, self._table_known = table, True
        self._waiting.extend(self._without_table)
        self._without_table = []

    def cancel(self, request_id: int) -> bool:
        """Fails the request as cancelled. False: it is not here."""
        found = self._running.pop(request_id, None) is not None
        for waiting in (self._waiting, self._without_table):
            for request in [request for request in waiting if request.id == request_id]:
                waiting.remove(request)
                found = True
        if found:
            self._send(protocol.failed(request_id, UserError("the request was cancelled")))
        return found

    def ready(self) -> bool:
        return bool(self._running or self._waiting)

    def counts(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        return len(self._running), len(self._waiting) + len(self._without_table)

    def run_slice(self) -> None:
        """One step of one request."""
        if self._waiting and len(self._running) < _MAX_CACHES:
            request = self._waiting.popleft()
            self._guarded(request.id, lambda: self._start(request))
            return
        if not self._running:
            return
        request_id, (generation, weights) = self._running.popitem(last=False)
        self._running[request_id] = (generation, weights)
        self._guarded(request_id, lambda: self._step(request_id, generation, weights))

    def _guarded(self, request_id: int, action) -> None:
        try:
            action()
        except Exception as error:  # out of memory and whatever a model throws: the request's failure, not the worker's
            self._running.pop(request_id, None)
            self._send(protocol.failed(request_id, error))

    def _start(self, request) -> None:
        sample = request.sample
        generation = Generation(
            self._model, sample, self._max_seq_len, self._config.max_sampling_sequences, self._table
        )
        weights = self._versions.get(sample.version, sample.version_dir.decode()) if sample.version else None
        self._running[request.id] = (generation, weights)

    def _step(self, request_id: int, generation: Generation, weights) -> None:
        before = generation.tokens
        finished = generation.step(weights)
        self.steps += 1
        self.tokens += generation.tokens - before
        if finished:
            del self._running[request_id]
            self._send(protocol.done(request_id, generation.result()))
