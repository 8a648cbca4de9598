"""The worker process: a reader thread a lane fills the mailbox, the compute thread empties it between slices.

Cancel, Status and Shutdown are answered by the control lane's reader, whatever the compute thread does.
"""

import collections
import threading
import time
from pathlib import Path

import torch

from hosted_tinker.pytorch_worker import backend_config, memory, protocol, stops
from hosted_tinker.pytorch_worker.base_model import BaseModel
from hosted_tinker.pytorch_worker.errors import UserError, WorkerError
from hosted_tinker.pytorch_worker.protocol import Lane
from hosted_tinker.pytorch_worker.sample_executor import SampleExecutor
from hosted_tinker.pytorch_worker.train_executor import TrainExecutor
from hosted_tinker.pytorch_worker.versions import Versions

_EARLY_CANCELS = 4096  # that overtook their sample on the other stream, or came after its end


class Worker:
    def __init__(self, control_fd: int, training_fd: int, sampling_fd: int):
        self._arrived = threading.Condition()
        self._mail: dict[str, list] = {name: [] for name in ("control", "training", "sampling", "cancels")}
        self._status = protocol.StatusResult()
        self._model: BaseModel | None = None
        self._trainer: TrainExecutor | None = None
        self._sampler: SampleExecutor | None = None
        self._token_table: tuple | None = None  # not told yet, or (the table or None,)
        self._early_cancels: collections.deque[int] = collections.deque(maxlen=_EARLY_CANCELS)
        self._snapshots: list = []  # waiting for the queue to drain
        self._sampling_owed = 0.0  # seconds that training has taken since sampling had its share
        self._training = Lane(training_fd, lambda r: self._put("training", r), self._on_broken("training"))
        self._sampling = Lane(sampling_fd, lambda r: self._put("sampling", r), self._on_broken("sampling"))
        self._control = Lane(control_fd, self._on_control, self._on_control_end)
        for lane in (self._training, self._sampling, self._control):
            lane.start()

    # ---- of the lanes' threads

    def _put(self, name: str, item) -> None:
        with self._arrived:
            self._mail[name].append(item)
            self._arrived.notify()

    def _on_broken(self, name: str):
        def end(error) -> None:
            if error is not None:  # what comes next is unknown
                print(f"the {name} stream is broken: {error}", flush=True)
                protocol.end_process(1)

        return end

    def _on_control_end(self, error) -> None:
        if error is not None:
            print(f"the control stream is broken: {error}", flush=True)
        protocol.end_process(0 if error is None else 1)

    def _on_control(self, request) -> None:
        kind = request.WhichOneof("body")
        if kind == "cancel":
            self._put("cancels", request.cancel.target)
            self._control.send(protocol.done(request.id, protocol.Ack()))
        elif kind == "status":
            status = protocol.StatusResult()
            status.CopyFrom(self._status)
            status.rss_bytes, status.peak_rss_bytes = memory.of_process("VmRSS:"), memory.of_process("VmHWM:")
            self._control.send(protocol.done(request.id, status))
        elif kind == "shutdown":
            self._control.send(protocol.done(request.id, protocol.Ack()))
            self._control.flush()
            protocol.end_process(0)
        else:
            self._put("control", request)

    # ---- of the compute thread

    def run(self) -> None:
        idle = True
        while True:
            self._receive(idle)
            if self._model is None:
                continue
            self._snapshot_if_drained()
            idle = not self._run_slice()
            self._publish_counters()

    def _receive(self, wait: bool) -> None:
        # What comes for the model before it is loaded stays where it is.
        names = ("control", "training", "sampling", "cancels") if self._model else ("control",)
        with self._arrived:
            while wait and not any(self._mail[name] for name in names):
                self._arrived.wait()
            mail = {name: self._mail[name] for name in names}
            self._mail.update({name: [] for name in names})
        for request in mail["control"]:
            self._handle_control(request)
        for request in mail.get("training", ()):
            self._trainer.push(request)
        for request in mail.get("sampling", ()):
            self._sampler.push(request)
            if request.id in self._early_cancels:
                self._early_cancels.remove(request.id)
                self._sampler.cancel(request.id)
        for target in mail.get("cancels", ()):
            if not self._sampler.cancel(target):
                self._early_cancels.append(target)

    def _run_slice(self) -> bool:
        """One slice of training or of sampling. While both have work they share the time evenly, and a sample waits for
        one micro-batch at most. False: there is nothing to do."""
        train, sample = self._trainer.ready(), self._sampler.ready()
        start = time.monotonic()
        if sample and (not train or self._sampling_owed > 0):
            self._sampler.run_slice()
            self._sampling_owed = max(0.0, self._sampling_owed - (time.monotonic() - start)) if train else 0.0
        elif train:
            self._trainer.run_slice()
            self._sampling_owed = time.monotonic() - start
        return train or sample

    def _handle_control(self, request) -> None:
        kind = request.WhichOneof("body")
        try:
            if kind == "initialize":
                self._control.send(protocol.done(request.id, self._initialize(request.id, request.initialize)))
                return
            if kind == "set_token_table":
                self._set_token_table(request.set_token_table.path.decode())
            elif self._model is None:
                raise WorkerError("the worker has no model yet: Initialize comes first")
            elif kind == "snapshot":
                self._snapshots.append(request)
                self._trainer.set_draining(True)
                return
            elif kind == "restore":
                self._trainer.restore(Path(request.restore.dir.decode()))
            self._control.send(protocol.done(request.id, protocol.Ack()))
        except Exception as error:
            self._control.send(protocol.failed(request.id, error))

    def _set_token_table(self, path: str) -> None:
        # A table that cannot be read is none: nobody shall wait for it.
        self._token_table = (None,)
        try:
            if path:
                self._token_table = (stops.read_token_table(path),)
        finally:
            if self._sampler is not None:
                self._sampler.set_token_table(*self._token_table)

    def _initialize(self, request_id: int, request):
        if self._model is not None:
            raise WorkerError("the worker has a model already")
        config = backend_config.parse(request.backend_config.decode())
        if request.threads > 0:
            torch.set_num_threads(request.threads)
        progress = protocol.Reply(id=request_id)
        progress.progress.CopyFrom(protocol.Progress(fraction=0.1, text=b"transformers loads the base model"))
        self._control.send(progress)
        model = BaseModel(request.model_dir.decode(), config)
        longest = model.longest or request.max_seq_len
        if request.max_seq_len < 0 or request.max_seq_len > longest:
            raise UserError(f"max_seq_len is {request.max_seq_len}, the model allows 1 to {longest}")
        info = protocol.WorkerInfo(max_seq_len=request.max_seq_len or longest)
        free = memory.free_bytes(model.device)
        adapters, versions = free // 4, free // 8
        info.device = memory.device_text(model.device).encode()
        info.memory_plan = memory.plan_text(model, config, adapters, versions).encode()
        store = Versions(model, versions)
        self._trainer = TrainExecutor(model, store, config, info.max_seq_len, adapters, self._training.send)
        self._sampler = SampleExecutor(model, store, config, info.max_seq_len, self._sampling.send)
        self._versions = store
        if self._token_table is not None:
            self._sampler.set_token_table(*self._token_table)
        self._model = model
        return info

    def _snapshot_if_drained(self) -> None:
        if not self._snapshots or not self._trainer.drained():
            return
        for request in self._snapshots:
            try:
                result = self._trainer.snapshot(Path(request.snapshot.dir.decode()))
                self._control.send(protocol.done(request.id, result))
            except Exception as error:
                self._control.send(protocol.failed(request.id, error))
        self._snapshots = []
        self._trainer.set_draining(False)

    def _publish_counters(self) -> None:
        running, waiting = self._sampler.counts()
        self._status = protocol.StatusResult(
            queued_training=self._trainer.queued(),
            running_sequences=running,
            waiting_sequences=waiting,
            micro_batches=self._trainer.micro_batches,
            decode_steps=self._sampler.steps,
            trained_tokens=self._trainer.tokens,
            sampled_tokens=self._sampler.tokens,
            adapter_bytes=self._trainer.adapter_bytes(),
            adapter_bytes_limit=self._trainer.adapter_bytes_limit,
            version_bytes=self._versions.nbytes(),
        )
