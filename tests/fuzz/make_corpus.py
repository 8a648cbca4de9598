"""Writes tests/fuzz/corpus from real inputs: files that transformers and safetensors write, bodies that the SDK sends, the
journal and worker requests of a real server. What is there already stays.

    HOSTED_TINKER_BIN_DIR=build/release/bin PYTHONPATH=python .venv/bin/python tests/fuzz/make_corpus.py
"""

import hashlib
import http.client
import json
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "sdk")]
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ["TINKER_TELEMETRY"] = "0"

import numpy as np
import safetensors.numpy
import tinker
import transformers
import zstandard
from tinker import types

import models
from datums import adam, random_datum, random_tokens, rl_datum
from server import Server

LARGEST = 6000  # bytes of a corpus file
MODEL = "test/model"


def keep(target: str, content: bytes) -> None:
    if 0 < len(content) <= LARGEST:
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha1(content).hexdigest()[:16]).write_bytes(content)


def write_files() -> None:
    values = np.arange(12, dtype=np.float32)
    for tensors in (
        {"a": values},
        {"weight": values.reshape(3, 4).astype(np.float16), "bias": values[:3], "ids": np.arange(4)},
        {"empty": values[:0], "scalar": values[0], "deep": values.reshape(1, 2, 2, 3)},
        {"double": values.astype(np.float64), "bytes": np.arange(5, dtype=np.uint8), "ints": np.arange(3, dtype=np.int32)},
    ):
        keep("safetensors", safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    keep("safetensors", safetensors.numpy.save({"m": values}, metadata={"format": "pt", "ä": "ö"}))

    small = dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ropes = [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "mscale": 0.7},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
         "original_max_position_embeddings": 64},
    ]  # fmt: skip
    configs = [
        transformers.LlamaConfig(**small),
        *(transformers.LlamaConfig(**small, rope_parameters={"rope_theta": 1e4, **rope}) for rope in ropes),
        transformers.MistralConfig(**small, sliding_window=16, num_key_value_heads=2),
        transformers.Qwen2Config(**small, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        transformers.Qwen3Config(**small, head_dim=32, num_key_value_heads=2, tie_word_embeddings=True),
    ]
    architectures = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                     "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
    for config in configs:
        config.architectures = [architectures[config.model_type]]
        keep("model_config", config.to_json_string().encode())
        # As it was written before transformers 5.
        old = config.to_dict()
        rope = old.pop("rope_parameters", None) or {}
        old["rope_theta"] = rope.pop("rope_theta", 1e4)
        old["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        keep("model_config", json.dumps(old).encode())

    run = "0e7b6000-fa81-43b7-99f5-6088df7f8e14:train:0"
    for path in (f"tinker://{run}/weights/0001", f"tinker://{run}/sampler_weights/final step.v1", "tinker://a/weights/b"):
        keep("tinker_path", path.encode())
    keep("tinker_path", b"0001")


TARGET_OF = {"/api/v1/forward_backward": "forward_backward"}


class Recorder(BaseHTTPRequestHandler):
    """Hands a request on and keeps its body."""

    protocol_version = "HTTP/1.1"
    upstream = 0

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = TARGET_OF.get(self.path, "json_bodies")
        if self.headers.get("Content-Encoding") == "zstd":
            keep("zstd_bodies", body)
            keep(target, zstandard.ZstdDecompressor().decompressobj().decompress(body))
        else:
            keep(target, body)
            keep("zstd_bodies", zstandard.compress(body))
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        connection.close()

    do_GET = do_POST = do_PUT = do_DELETE = handle_one

    def log_message(self, *_) -> None:
        pass


def work(url: str) -> None:
    service = tinker.ServiceClient(base_url=url, api_key="tml-test")
    client = service.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result()
    client.forward_backward([random_datum(1, 8), random_datum(2, 3)], loss_fn="cross_entropy").result()
    client.optim_step(adam(grad_clip_norm=1.0, weight_decay=0.1)).result()
    rl = rl_datum(random_tokens(1, 7), [-1.0] * 6, [0.5] * 6)
    for loss, config in (("ppo", {"clip_low_threshold": 0.9}), ("importance_sampling", None), ("dro", {"beta": 0.1})):
        client.forward_backward([rl], loss_fn=loss, loss_fn_config=config).result()
    wide = np.zeros((4, 40), dtype=np.int64)
    wide[1, 2] = 7
    import torch

    sparse = {"target_tokens": torch.from_numpy(wide), "weights": torch.from_numpy((wide > 0).astype(np.float32))}
    datum = types.Datum(model_input=types.ModelInput.from_ints([3, 4, 5, 6]), loss_fn_inputs=sparse)
    client.forward_backward([datum], loss_fn="cross_entropy").result()
    client.forward([random_datum(3, 5)], loss_fn="cross_entropy").result()
    path = client.save_state("one", user_metadata={"step": "1"}, ttl_seconds=7200).result().path
    service.create_training_client_from_state_with_optimizer(path).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    for params in (
        dict(max_tokens=3, temperature=0.7, top_k=5, top_p=0.9, stop=["a", "bc"], seed=3),
        dict(max_tokens=2, temperature=0.0, stop=[7]),
    ):
        sampler.sample(prompt, 2, types.SamplingParams(**params), include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    targets = types.TensorData(data=[6, -1, 7, -1], dtype="int64", shape=[2, 2])
    one = types.SamplingParams(max_tokens=1)
    sampler.sample(prompt, 1, one, include_prompt_logprobs=True, target_prompt_logprobs=targets, prompt_alt_tokens_k=2).result()
    service.close("success").result()


def keep_journal(data_dir: Path) -> None:
    """The records, the worker requests inside them, and a segment of the first few."""
    file_header, record_header = 28, 12
    (segment,) = data_dir.rglob("*.journal")
    data, at = segment.read_bytes(), file_header
    while at + record_header < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        payload = data[at + record_header : at + record_header + length]
        keep("journal_record", payload)
        for begin in range(len(payload)):  # an encoded worker request is a field of some record
            body = field(payload, begin)
            if body and len(body) > 20:
                keep("worker_frames", len(body).to_bytes(4, "little") + body)
                break
        at += record_header + length
        if at <= LARGEST:
            end = at
    for change in (b"\0\x40\0\x01", b"\0\x1e\0\x80", b"\1\x70\0\0", b"\0\x03\0\x01"):
        keep("journal_damage", change + b"\x05first\0\x10" + data[:16] + b"\x20" + data[28:60])
    keep("journal_file", data[:end])
    keep("journal_file", data[: end - 3])
    keep("journal_file", data[:file_header])


def field(payload: bytes, begin: int) -> bytes | None:
    """The length-delimited field whose length is written at `begin` and which is the payload's last."""
    length, shift, at = 0, 0, begin
    while at < len(payload) and shift < 28:
        length |= (payload[at] & 0x7F) << shift
        at += 1
        if not payload[at - 1] & 0x80:
            break
        shift += 7
    return payload[at:] if begin > 2 and at + length == len(payload) else None


def main() -> None:
    write_files()
    with tempfile.TemporaryDirectory() as folder:
        model = models.write_model(Path(folder) / "model", "llama")
        server = Server({MODEL: model}, Path(folder) / "data").start()
        Recorder.upstream = server.port
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            work(f"http://127.0.0.1:{proxy.server_address[1]}")
        finally:
            server.stop()
        keep_journal(server.data_dir)


if __name__ == "__main__":
    main()
