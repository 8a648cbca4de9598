"""A tiny random model and a server of it, for benchmarks of the way rather than the work."""

import contextlib
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_tiny_llama(directory, layers=2, hidden=64, vocab=1024, **overrides):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
                    num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=True)
    LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).save_pretrained(directory)


@contextlib.contextmanager
def serve(directory, name="tiny", *options):
    """Yields (url, process, seconds from exec to healthz 200); the server ends with the block."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data:
        start = time.perf_counter()
        process = subprocess.Popen(
            [os.environ.get("HT_LAUNCHER", ROOT / "build/hosted-tinker"), "serve", "--model-alias", f"{name}={directory}",
             "--base-model", str(directory), "--port", str(port), "--data-dir", data, *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5).read()
                    break
                except (urllib.error.URLError, ConnectionError):
                    if process.poll() is not None:
                        raise RuntimeError(f"the server ended with {process.returncode}")
                    time.sleep(0.005)
            yield url, process, time.perf_counter() - start
        finally:
            process.terminate()
            process.wait(30)
