"""A real hosted-tinker process for the tests: start, wait, stop, kill -9, restart on the same data directory."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Started through the launcher, so that the path users take is the one under test."""

    def __init__(self, models: dict[str, Path], data_dir: Path, *options: str):
        self.models = models
        self.data_dir = data_dir
        self.options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.with_name(data_dir.name + ".log")
        self.process: subprocess.Popen | None = None

    def start(self, timeout: float = 60) -> "Server":
        command = [sys.executable, "-m", "hosted_tinker", "serve", "--port", str(self.port)]
        command += ["--data-dir", str(self.data_dir), "--threads", "2", *self.options]
        for name, directory in self.models.items():
            command += ["--model-alias", f"{name}={directory}"]
        environment = dict(os.environ, PYTHONPATH=str(ROOT / "python"), OMP_WAIT_POLICY="passive")
        environment.setdefault("HOSTED_TINKER_BIN_DIR", str(ROOT / "build/release/bin"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + timeout
        while not self.ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server was not ready within {timeout:.0f} s:\n{self.log_tail()}")
            time.sleep(0.05)
        return self

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, decoded JSON or text) of a plain HTTP request to /api/v1/<path>."""
        headers = {"X-API-Key": "tml-test", "Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", data=body, method=method, headers=headers)
        try:
            with _OPENER.open(request, timeout=60) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode("utf-8", "replace")

    def post(self, path: str, value):
        return self.request("POST", path, json.dumps(value).encode())

    def ready(self) -> bool:
        try:
            return self.request("GET", "healthz")[0] == 200
        except OSError:
            return False

    def stop(self, timeout: float = 20) -> int:
        """Ctrl-C; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """kill -9 of the server alone; its workers have to notice by themselves."""
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        names = ("hosted-tinker-worker", "hosted_tinker.pytorch_worker")
        return [child for child in children if any(name in " ".join(child.cmdline()[:3]) for name in names)]

    def kill_worker(self) -> None:
        workers = self.workers()
        assert workers, "no worker process to kill"
        for worker in workers:
            worker.send_signal(signal.SIGKILL)

    def micro_batches(self) -> int:
        """Executed so far: the journal has a record of each (src/server/store/journal.h, proto/journal.proto)."""
        file_header, record_header, micro_batch_tag = 28, 12, 0x22
        count = 0
        for segment in self.data_dir.rglob("*.journal"):
            data, at = segment.read_bytes(), file_header
            while at + record_header < len(data):
                length = int.from_bytes(data[at + 4 : at + 8], "little")
                count += data[at + record_header] == micro_batch_tag
                at += record_header + length
        return count

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
