"""What the server adds to a call: latency, throughput, parked polls, memory, start-up.

    .venv/bin/python bench/control_plane.py

Raw HTTP over keep-alive connections against its own server of a tiny random model. The whole time of an optim_step
(submit, journal, worker, poll) bounds from above what the server adds to a call.
"""

import asyncio
import http.client
import json
import statistics
import tempfile
import threading
import time

import psutil

from tiny_server import make_tiny_llama, serve

KEY = {"X-API-Key": "tml-bench", "Content-Type": "application/json"}


class Connection:
    def __init__(self, url):
        self.http = http.client.HTTPConnection(url.removeprefix("http://"))

    def call(self, path, body=None):
        payload = None if body is None else json.dumps(body)
        self.http.request("GET" if body is None else "POST", "/api/v1/" + path, payload, KEY)
        response = self.http.getresponse()
        data = response.read()
        if response.status not in (200, 408):
            raise RuntimeError(f"{path}: {response.status} {data[:200]!r}")
        return json.loads(data)

    def result(self, submitted):
        while True:
            answer = self.call("retrieve_future", {"request_id": submitted["request_id"], "allow_metadata_only": False})
            if answer.get("type") != "try_again":
                return answer


def percentile(times, share):
    return sorted(times)[int(len(times) * share)] * 1e3


def timed(count, call):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def row(name, value):
    print(f"| {name} | {value} |", flush=True)


def requests_per_second(url, connections, seconds=3.0):
    done = [0] * connections
    stop = time.perf_counter() + seconds

    def work(index):
        connection = Connection(url)
        while time.perf_counter() < stop:
            connection.call("get_server_capabilities")
            done[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(connections)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return sum(done) / seconds


async def park(url, request_id, count):
    """Opens `count` polls of one unfinished request and leaves them open; returns their writers."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"request_id": request_id, "allow_metadata_only": False}).encode()
    head = (f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: {host}\r\nX-API-Key: tml-bench\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode()
    streams = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + body)
        streams.append((reader, writer))
    await asyncio.gather(*(writer.drain() for _, writer in streams))
    return streams


def main():
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_llama(directory)
        with serve(directory) as (url, launcher, ready_seconds):
            server = psutil.Process(launcher.pid)
            connection = Connection(url)
            session = connection.call("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})["session_id"]
            model = f"{session}:train:0"
            connection.result(connection.call("create_model", {
                "session_id": session, "model_seq_id": 0, "base_model": "tiny",
                "lora_config": {"rank": 8, "train_attn": True, "train_mlp": True, "train_unembed": True}}))

            print("| measure | value |\n|---|---|")
            row("exec to ready", f"{ready_seconds:.2f} s")

            sequence = iter(range(1, 10**6))

            def optim_step():
                connection.result(connection.call("optim_step", {
                    "model_id": model, "seq_id": next(sequence), "adam_params": {"learning_rate": 1e-4}}))

            timed(20, optim_step)
            total = timed(200, optim_step)
            row("optim_step, submit and poll: p50 / p99", f"{percentile(total, .5):.2f} / {percentile(total, .99):.2f} ms")
            heartbeat = timed(500, lambda: connection.call("session_heartbeat", {"session_id": session}))
            row("session_heartbeat: p50 / p99", f"{percentile(heartbeat, .5):.2f} / {percentile(heartbeat, .99):.2f} ms")
            row("GET capabilities, 1 connection", f"{requests_per_second(url, 1):.0f} requests/s")
            row("GET capabilities, 32 connections (the Python client is the limit)", f"{requests_per_second(url, 32):.0f} requests/s")

            # A number is missing below this one: it stays parked for as long as we like.
            parked = connection.call("optim_step", {"model_id": model, "seq_id": next(sequence) + 1,
                                                    "adam_params": {"learning_rate": 1e-4}})
            before = server.memory_info().rss

            async def measure_parked():
                streams = await park(url, parked["request_id"], 2000)
                await asyncio.sleep(1.0)
                grown = server.memory_info().rss - before
                busy = await asyncio.to_thread(timed, 200, lambda: connection.call("session_heartbeat", {"session_id": session}))
                for _, writer in streams:
                    writer.close()
                return grown, busy

            grown, busy = asyncio.run(measure_parked())
            row("2,000 parked polls: memory", f"{grown / 2**20:.1f} MiB")
            row("session_heartbeat beside them: p50", f"{statistics.median(busy) * 1e3:.2f} ms")
            row("server RSS", f"{server.memory_info().rss / 2**20:.0f} MiB")
            row("worker RSS", f"{sum(child.memory_info().rss for child in server.children()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
