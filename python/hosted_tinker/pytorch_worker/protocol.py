"""The wire of src/worker_protocol: protobuf frames over three inherited sockets, one a lane.

The message classes come from worker.desc, which the build makes from proto/worker.proto: server and worker are of one
build, and no generated code is checked in.
"""

import os
import queue
import socket
import struct
import threading

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from hosted_tinker import installation
from hosted_tinker.pytorch_worker.errors import category_of, text_of

MAX_FRAME_BYTES = 1 << 30  # kMaxFrameBytes of src/worker_protocol/codec.h
DESCRIPTORS = "worker.desc"
_PACKAGE = "ht.worker_protocol.pb."


def _load_classes() -> dict:
    path = installation.bin_dir() / DESCRIPTORS
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    for file in files.file:
        pool.Add(file)
    messages = [message for file in files.file for message in file.message_type]
    return {m.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(_PACKAGE + m.name)) for m in messages}


_CLASSES = _load_classes()
Request, Reply, Failure, Progress = (_CLASSES[name] for name in ("Request", "Reply", "Failure", "Progress"))
Ack, WorkerInfo, TrainResult, OptimResult = (_CLASSES[n] for n in ("Ack", "WorkerInfo", "TrainResult", "OptimResult"))
SaveResult, SampleResult, SnapshotResult = (_CLASSES[n] for n in ("SaveResult", "SampleResult", "SnapshotResult"))
StatusResult, MicroBatch = _CLASSES["StatusResult"], _CLASSES["MicroBatch"]

_DONE_FIELDS = {
    Ack: "ack",
    WorkerInfo: "worker_info",
    TrainResult: "train",
    OptimResult: "optim",
    SaveResult: "save",
    SampleResult: "sample",
    SnapshotResult: "snapshot",
    StatusResult: "status",
}


def int32(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<i4")


def float32(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<f4")


def to_bytes(values, dtype: str) -> bytes:
    """dtype "<i4" or "<f4"."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def done(request_id: int, body):
    reply = Reply(id=request_id)
    getattr(reply.done, _DONE_FIELDS[type(body)]).CopyFrom(body)
    return reply


def failed(request_id: int, error: Exception):
    return Reply(id=request_id, failure=Failure(category=category_of(error), message=text_of(error).encode()))


def framed(reply) -> bytes:
    payload = reply.SerializeToString()
    if len(payload) > MAX_FRAME_BYTES:
        size = len(payload)
        error = RuntimeError(f"the result takes {size} bytes, at most {MAX_FRAME_BYTES} can be sent")
        payload = failed(reply.id, error).SerializeToString()
    return struct.pack("<I", len(payload)) + payload


class Lane:
    """One stream: a thread reads requests into `on_request`, another writes replies. `on_end(error or None)` comes
    once."""

    def __init__(self, fd: int, on_request, on_end):
        self._socket = socket.socket(fileno=fd)
        self._on_request, self._on_end = on_request, on_end
        self._replies: queue.Queue = queue.Queue()
        threading.Thread(target=self._write, daemon=True).start()

    def start(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, reply) -> None:
        """Never blocks."""
        self._replies.put(framed(reply))

    def flush(self) -> None:
        self._replies.join()

    def _write(self) -> None:
        while True:
            frame = self._replies.get()
            try:
                self._socket.sendall(frame)
            except OSError:
                pass  # the server is gone: the end of the control stream ends the worker
            self._replies.task_done()

    def _exactly(self, count: int) -> bytearray | None:
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            got = self._socket.recv_into(view[at:])
            if got == 0:
                if at > 0:
                    raise EOFError("it ended inside a frame")
                return None
            at += got
        return data

    def _read(self) -> None:
        error = None
        try:
            while (prefix := self._exactly(4)) is not None:
                (length,) = struct.unpack("<I", prefix)
                if length > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
                payload = self._exactly(length) if length else b""
                if payload is None:
                    raise EOFError("it ended inside a frame")
                self._on_request(Request.FromString(bytes(payload)))
        except ConnectionResetError:
            pass
        except Exception as thrown:  # whatever it is, what follows on the stream cannot be trusted
            error = thrown
        self._on_end(error)


def end_process(status: int) -> None:
    """At once: the compute thread may be busy for seconds, and nobody waits for its work."""
    os._exit(status)
