"""Random small checkpoints of every family, written by transformers, and their PEFT adapters."""

import contextlib
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

VOCAB = 199
ATTN = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.12,
    tie_word_embeddings=False,
)


def _rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def _llama(**changes):
    return LlamaConfig(**{**_BASE, **changes})


# name: (config, dtype on disk, shard size or None)
FAMILIES = {
    "llama-tied-9-3-heads": (
        lambda: _llama(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
        torch.bfloat16,
        None,
    ),
    "llama-head-dim-sharded": (lambda: _llama(head_dim=20), torch.float16, "30KB"),
    "llama-biases": (lambda: _llama(attention_bias=True, mlp_bias=True), torch.float32, None),
    "llama-rope-linear": (lambda: _llama(**_rope(rope_type="linear", factor=2.5)), torch.float32, None),
    "llama-rope-dynamic": (
        lambda: _llama(**{**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 24}),
        torch.float32,
        None,
    ),
    "llama-rope-llama3": (
        lambda: _llama(
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
        torch.bfloat16,
        "40KB",
    ),
    "llama-rope-yarn": (
        lambda: _llama(**_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
        torch.float32,
        None,
    ),
    "llama-rope-longrope": (
        lambda: _llama(
            **_rope(
                rope_type="longrope",
                factor=2.0,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                original_max_position_embeddings=32,
            )
        ),
        torch.float32,
        None,
    ),
    "mistral-sliding-window": (
        lambda: MistralConfig(**{**_BASE, "sliding_window": 7, "head_dim": 16}),
        torch.bfloat16,
        None,
    ),
    "qwen2-biases-tied": (lambda: Qwen2Config(**{**_BASE, "tie_word_embeddings": True}), torch.bfloat16, None),
    "qwen2-sliding-upper-layers": (
        lambda: Qwen2Config(**{**_BASE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        torch.float32,
        None,
    ),
    "qwen3-qk-norm": (lambda: Qwen3Config(**{**_BASE, "head_dim": 16}), torch.bfloat16, "30KB"),
    "qwen3-tied": (lambda: Qwen3Config(**{**_BASE, "head_dim": 24, "tie_word_embeddings": True}), torch.float16, None),
}


def write_checkpoint(name: str, directory: Path) -> Path:
    make_config, dtype, shard = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(make_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return directory


def peft_model(checkpoint: Path, *, rank=8, attn=True, mlp=True, unembed=True, seed=1):
    """The checkpoint in float32 with a random adapter, B ≠ 0."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    targets = (ATTN if attn else []) + (MLP if mlp else []) + (["lm_head"] if unembed else [])
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            elif ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


@contextlib.contextmanager
def in_float64(model):
    """The model in float64 with its norms in float64 too (transformers' round to float32 whatever the model's dtype). The
    rotary tables stay float32, as they are in the engine."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    rounding = {cls: cls.forward for cls in (LlamaRMSNorm, Qwen2RMSNorm)}
    for cls in rounding:
        cls.forward = norm
    try:
        yield model.double()
    finally:
        for cls, forward in rounding.items():
            cls.forward = forward
        model.float()


def tensor_name(peft_name: str) -> str:
    """PEFT's parameter name -> the name in adapter_model.safetensors."""
    return peft_name.replace(".default", "").replace("base_model.model.lm_head", "base_model.model.model.unembed_tokens")


def lora_parameters(model) -> dict:
    return {tensor_name(name): p for name, p in model.named_parameters() if ".lora_" in name}


def write_adapter(tensors: dict, rank: int, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()},
              directory / "adapter_model.safetensors")
    targets = sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors})
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": targets})
    )
    return directory
