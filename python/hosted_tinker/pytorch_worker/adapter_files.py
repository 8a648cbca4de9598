"""Adapters on disk: the checkpoint layout of engine/runtime/adapter_files.cpp, and the state files of a snapshot."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hosted_tinker.pytorch_worker.errors import UserError, WorkerError
from hosted_tinker.pytorch_worker.lora import ALPHA, Adapter, Layout, LoraConfig
from hosted_tinker.pytorch_worker.sites import ATTN, MLP, UNEMBED, Site

CONFIG, WEIGHTS, OPTIMIZER = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"
_MANIFEST, _FORMAT = "manifest.json", 1
_STATE = ("weights", "grad", "exp_avg", "exp_avg_sq")


def _place(temporary: Path, path: Path) -> None:
    """A reader never sees half a file, whatever ends this process."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> int:
    temporary = path.with_name(path.name + ".tmp")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, temporary, metadata)
    _place(temporary, path)
    return path.stat().st_size


def _write_json(path: Path, value) -> int:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    _place(temporary, path)
    return path.stat().st_size


def _name(site: Site, factor: str, suffix: str = "") -> str:
    return f"base_model.model.{site.module}.lora_{factor}.weight{suffix}"


def _tensors(layout: Layout, flat: torch.Tensor, suffix: str = "") -> dict[str, torch.Tensor]:
    return {
        _name(site, factor, suffix): value
        for site, *pair in layout.factors(flat)
        for factor, value in zip("AB", pair)
    }


def _targets(sites: list[Site]) -> dict[Site, str]:
    """The name of each site in target_modules: the last part of its path, or two where another group has the same
    (GPT-2's attn.c_proj and mlp.c_proj)."""
    groups: dict[str, set[str]] = {}
    for site in sites:
        groups.setdefault(site.module.rpartition(".")[2], set()).add(site.group)
    return {
        site: ".".join(site.module.split(".")[-1 if len(groups[site.module.rpartition(".")[2]]) == 1 else -2 :])
        for site in sites
    }


def save_weights(layout: Layout, weights: torch.Tensor, base_model: str, directory: Path) -> int:
    """adapter_model.safetensors and adapter_config.json, which PEFT reads too; returns their bytes."""
    targets = _targets(layout.all_sites)
    size = _write_tensors(directory / WEIGHTS, _tensors(layout, weights), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layout.config.rank,
        "lora_alpha": ALPHA,
        "target_modules": list(dict.fromkeys(targets[site] for site in layout.sites)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "revision": None,
    }
    return size + _write_json(directory / CONFIG, config)


def save_optimizer(adapter: Adapter, directory: Path) -> int:
    tensors = _tensors(adapter.layout, adapter.exp_avg, ".exp_avg")
    tensors |= _tensors(adapter.layout, adapter.exp_avg_sq, ".exp_avg_sq")
    tensors["step"] = torch.tensor([adapter.step], dtype=torch.int64)
    return _write_tensors(directory / OPTIMIZER, tensors)


def read_config(directory: Path, sites: list[Site]) -> LoraConfig:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        names = tuple(f".{name}" for name in config["target_modules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no adapter's configuration: {error}") from error
    if alpha != ALPHA:
        raise UserError(f"{path}: lora_alpha is {alpha}, only {ALPHA} is supported")
    if not isinstance(rank, int) or not 1 <= rank <= 256:
        raise UserError(f"{path}: r is {rank}, allowed are 1 to 256")
    targets = _targets(sites)
    groups = {site.group for site in sites if any(name.endswith(f".{targets[site]}") for name in names)}
    return LoraConfig(rank, 0, ATTN in groups, MLP in groups, UNEMBED in groups)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _fill(layout: Layout, tensors: dict[str, torch.Tensor], suffix: str, path: Path) -> torch.Tensor:
    flat = torch.zeros(layout.numel, dtype=torch.float32)
    for site, *pair in layout.factors(flat):
        for factor, into in zip("AB", pair):
            name = _name(site, factor, suffix)
            if name not in tensors:
                raise UserError(f"{path} lacks the tensor {name}")
            if tensors[name].shape != into.shape:
                shape, expected = list(tensors[name].shape), list(into.shape)
                raise UserError(f"tensor {name} in {path} has the shape {shape}, expected {expected}")
            into.copy_(tensors[name])
    return flat


def load_weights(layout: Layout, directory: Path, device) -> torch.Tensor:
    path = directory / WEIGHTS
    tensors, _ = _read(path)
    known = {_name(site, factor) for site in layout.sites for factor in "AB"}
    for name in tensors:
        if name not in known:
            raise UserError(f"tensor {name} in {path} belongs to no LoRA site that {CONFIG} names for this model")
    return _fill(layout, tensors, "", path).to(device)


def load_optimizer(adapter: Adapter, directory: Path) -> None:
    path = directory / OPTIMIZER
    tensors, _ = _read(path)
    if "step" not in tensors:
        raise UserError(f"{path} lacks the tensor step")
    averages = [_fill(adapter.layout, tensors, suffix, path) for suffix in (".exp_avg", ".exp_avg_sq")]
    adapter.exp_avg, adapter.exp_avg_sq = (average.to(adapter.weights.device) for average in averages)
    adapter.step = int(tensors["step"][0])


def save_state(adapter: Adapter, path: Path) -> None:
    """Everything that training depends on."""
    config = adapter.layout.config
    metadata = {
        "rank": str(config.rank),
        "seed": str(config.seed),
        "train_attn": str(int(config.train_attn)),
        "train_mlp": str(int(config.train_mlp)),
        "train_unembed": str(int(config.train_unembed)),
        "step": str(adapter.step),
        "backend": "pytorch",
    }
    _write_tensors(path, {name: getattr(adapter, name) for name in _STATE}, metadata)


def load_state(path: Path, layout_of, device) -> Adapter:
    """`layout_of`: LoraConfig → Layout."""
    tensors, metadata = _read(path)
    if metadata.get("backend") != "pytorch":
        raise WorkerError(f"{path} is another backend's: its snapshots are continued with that backend only")
    flags = (metadata[key] == "1" for key in ("train_attn", "train_mlp", "train_unembed"))
    layout = layout_of(LoraConfig(int(metadata["rank"]), int(metadata["seed"]), *flags))
    return Adapter(layout, *(tensors[name].to(device) for name in _STATE), step=int(metadata["step"]))


def write_manifest(directory: Path, next_micro_batch: int, adapters: list[dict], versions: list[dict]) -> None:
    """Last: a directory without it is no snapshot."""
    value = {"format": _FORMAT, "next_micro_batch": next_micro_batch, "adapters": adapters, "versions": versions}
    _write_json(directory / _MANIFEST, value)


def read_manifest(directory: Path) -> dict:
    try:
        value = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkerError(f"{directory} is no snapshot: {error}") from error
    if value.get("format") != _FORMAT:
        raise WorkerError(f"the snapshot {directory} has the format {value.get('format')}, this worker reads {_FORMAT}")
    return value
