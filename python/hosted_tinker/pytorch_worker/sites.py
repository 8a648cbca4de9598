"""Where a model carries LoRA: the site table of src/model_spec/lora_sites.h for any architecture of transformers.

A site is a linear, or rows of a fused one: y[begin:end] += (alpha / r) B A x. Its name is the module's path in the
model; a slice of a fused module has the plain name in its place (`…self_attn.q_proj` for the first rows of
`…self_attn.qkv_proj`), and the output embedding is `model.unembed_tokens`, so that families of the native engine have
the native names.
"""

import dataclasses
import re

import torch
from transformers.pytorch_utils import Conv1D

ATTN, MLP, UNEMBED = "attn", "mlp", "unembed"
UNEMBED_NAME = "model.unembed_tokens"

_LAYER = re.compile(r"\.(\d+)\.")
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|linear_attn", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|fc\d?|expert|moe|dense_|block_sparse", re.IGNORECASE)
# No LoRA: routers, gates of shared experts, the small projections of recurrent layers, and towers that see no text.
_NEVER = re.compile(
    r"(^|\.)(router|gate|shared_expert_gate|in_proj_a|in_proj_b|in_proj_ba|vision\w*|visual|audio\w*)(\.|$)"
)


@dataclasses.dataclass(frozen=True)
class Site:
    module: str  # the name in adapter files
    group: str
    in_features: int
    out_features: int
    path: str  # of the module that carries it
    begin: int  # first row of its output


def _features(module) -> tuple[int, int] | None:
    """(in, out) of a linear."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _slices(leaf: str, out_features: int, config) -> list[tuple[str, int]] | None:
    """(plain name, rows) of a fused linear whose parts lie one after the other; None: it is plain, or interleaved."""
    if leaf == "gate_up_proj":
        return [("gate_proj", out_features // 2), ("up_proj", out_features // 2)]
    if leaf == "c_attn" and out_features % 3 == 0:
        return [(name, out_features // 3) for name in ("q_proj", "k_proj", "v_proj")]
    if leaf == "qkv_proj":
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim, rest = divmod(out_features, heads + 2 * key_heads)
        if rest == 0:
            return [("q_proj", heads * head_dim), ("k_proj", key_heads * head_dim), ("v_proj", key_heads * head_dim)]
    return None


def _group(path: str) -> str | None:
    if not _LAYER.search(path) or _NEVER.search(path):
        return None
    inside = path[_LAYER.search(path).end() :]
    if _ATTENTION.search(inside):
        return ATTN
    return MLP if _MLP.search(inside) else None


def find_sites(model) -> list[Site]:
    """All sites in the order of the model's modules, the unembedding last. An interleaved fused linear is one site."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    sites = []
    for path, module in model.named_modules():
        features = _features(module)
        group = _group(path) if features and module is not head else None
        if group is None:
            continue
        parent, _, leaf = path.rpartition(".")
        begin = 0
        for name, rows in _slices(leaf, features[1], config) or [(leaf, features[1])]:
            sites.append(Site(f"{parent}.{name}", group, features[0], rows, path, begin))
            begin += rows
    if head is not None:
        out_features, in_features = head.weight.shape
        path = next(path for path, module in model.named_modules() if module is head)
        sites.append(Site(UNEMBED_NAME, UNEMBED, in_features, out_features, path, 0))
    return sites


def unreachable_experts(model) -> list[str]:
    """Modules whose experts are one 3-D parameter: no site stands for them."""
    return [
        path
        for path, module in model.named_modules()
        if any(p.dim() == 3 for p in module.parameters(recurse=False)) and _MLP.search(path) and _LAYER.search(path)
    ]
