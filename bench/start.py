"""How long a start takes: exec of `hosted-tinker serve` → the first sampled token, and the worker's memory meanwhile.

    .venv/bin/python bench/start.py [--model ~/.cache/hosted-tinker/SmolLM2-135M-Instruct] [--rounds 5]

Without --model it serves a tiny random one. Prints medians as rows of a table. The client is a warm process that submits
its sample as soon as the server listens; the request waits there for the worker, as a user's would. Memory is RssAnon of
the worker: what it holds itself, without mapped files.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from tinker.proto import tinker_public_pb2 as public_pb

from tiny_server import ROOT

HEADERS = {"X-API-Key": "tml-bench", "Content-Type": "application/json"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(port, method, path, body=None):
    """(status, content type, body). A connection of its own: the first ones are refused."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, "/api/v1/" + path, None if body is None else json.dumps(body), HEADERS)
        response = connection.getresponse()
        return response.status, response.headers.get_content_type(), response.read()
    finally:
        connection.close()


def post(port, path, body):
    """JSON, or the sampled tokens of a protobuf answer."""
    status, kind, data = call(port, "POST", path, body)
    if status not in (200, 408):
        raise RuntimeError(f"{path}: {status} {data[:200]!r}")
    if kind == "application/json":
        return json.loads(data)
    answer = public_pb.SampleResponse.FromString(data)
    return {"tokens": [len(sequence.tokens) for sequence in answer.sequences]}


def first_token(port):
    session = post(port, "create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"})["session_id"]
    sampler = post(port, "create_sampling_session",
                   {"session_id": session, "sampling_session_seq_id": 0, "base_model": "model"})["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(1, 17))}]}
    submitted = post(port, "asample", {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "prompt": prompt,
                                       "sampling_params": {"max_tokens": 1}})
    while True:
        answer = post(port, "retrieve_future", {"request_id": submitted["request_id"]})
        if answer.get("type") != "try_again":
            return answer["tokens"]


def rss_anon(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Observer(threading.Thread):
    """When the launcher became the server, when the worker appeared, the highest RssAnon of the worker."""

    def __init__(self, pid, start):
        super().__init__(daemon=True)
        self.pid, self.start_time = pid, start
        self.server_at = self.worker_at = self.worker = None
        self.peak = 0.0
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(0.002):
            try:
                if self.server_at is None and os.readlink(f"/proc/{self.pid}/exe").endswith("hosted-tinker-server"):
                    self.server_at = time.perf_counter() - self.start_time
                if self.worker is None:
                    for child in psutil.Process(self.pid).children():
                        if "hosted-tinker-worker" in child.cmdline()[0]:
                            self.worker, self.worker_at = child.pid, time.perf_counter() - self.start_time
                else:
                    self.peak = max(self.peak, rss_anon(self.worker))
            except (OSError, IndexError, psutil.Error):
                continue  # between fork and exec


def measure(model):
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        start = time.perf_counter()
        process = subprocess.Popen(
            [os.environ.get("HT_LAUNCHER", ROOT / "build/hosted-tinker"), "serve", "--model-alias", f"model={model}",
             "--port", str(port), "--data-dir", data], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        observer = Observer(process.pid, start)
        observer.start()
        times = {}
        try:
            while "listens" not in times:
                try:
                    call(port, "GET", "healthz")
                    times["listens"] = time.perf_counter() - start
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"the server ended with {process.returncode}")
                    time.sleep(0.005)
            token = {}
            client = threading.Thread(target=lambda: token.update(tokens=first_token(port), at=time.perf_counter() - start))
            client.start()
            while call(port, "GET", "healthz")[0] != 200:
                time.sleep(0.005)
            times["ready"] = time.perf_counter() - start
            client.join()
            if not token.get("tokens"):
                raise RuntimeError("no token came")
            times["token"] = token["at"]
            times["cpu_server"] = sum(psutil.Process(process.pid).cpu_times()[:2])  # one process: launcher, then server
            times["cpu_worker"] = sum(psutil.Process(observer.worker).cpu_times()[:2])
            time.sleep(0.5)  # the tokenizer's export and the allocator settle
            observer.over.set()
            observer.join()
            times |= {"server": observer.server_at, "worker": observer.worker_at, "peak": observer.peak,
                      "after": rss_anon(observer.worker)}
        finally:
            observer.over.set()
            process.terminate()
            process.wait(30)
    return times


ROWS = [("launcher: exec → the server's exec", "server", "{:.2f} s"),
        ("→ the server listens", "listens", "{:.2f} s"),
        ("→ the worker's process", "worker", "{:.2f} s"),
        ("→ ready (healthz 200)", "ready", "{:.2f} s"),
        ("→ the first sampled token", "token", "{:.2f} s"),
        ("processor time of launcher and server", "cpu_server", "{:.2f} s"),
        ("processor time of the worker", "cpu_worker", "{:.2f} s"),
        ("worker, RssAnon: highest while loading", "peak", "{:.0f} MiB"),
        ("worker, RssAnon: after", "after", "{:.0f} MiB")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch)
            # A process of its own: torch in this one would share the cores with the server.
            subprocess.run([sys.executable, "-c", f"import tiny_server; tiny_server.make_tiny_llama({scratch!r})"],
                           cwd=Path(__file__).parent, check=True)
        measure(model)  # brings programs and weights into the page cache
        load = os.getloadavg()[0]
        rounds = [measure(model) for _ in range(args.rounds)]
    print(f"load average before: {load:.1f}\n\n| from exec | {args.model.name if args.model else 'tiny'} |\n|---|---|")
    for text, key, form in ROWS:
        print(f"| {text} | {form.format(statistics.median(r[key] for r in rounds))} |")


if __name__ == "__main__":
    main()
