"""What the machine has, and how the worker divides it."""

import torch

from hosted_tinker.pytorch_worker.backend_config import BackendConfig


def of_process(name: str) -> int:
    """"VmRSS:" or "VmHWM:" of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), 0)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            with open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
                return min(available, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return available


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}, transformers"
    return f"cpu, {torch.get_num_threads()} threads, transformers"


def plan_text(model, config: BackendConfig, adapters: int, versions: int) -> str:
    mib = 1 << 20
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    groups = {group: sum(site.group == group for site in model.sites) for group in ("attn", "mlp", "unembed")}
    sites = ", ".join(f"{count} {group}" for group, count in groups.items())
    lines = [
        f"{type(model.model).__name__}, {model.dtype}: base weights {weights // mib} MiB",
        f"LoRA sites: {sites}",
        f"adapters in training: at most {adapters // mib} MiB",
        f"micro-batches: {config.micro_batch_tokens} tokens of one request",
        f"sampler versions in memory: {versions // mib} MiB",
    ]
    if model.experts:
        lines.append(f"no LoRA on {len(model.experts)} tensors of fused experts: choose train_mlp=False")
    return "\n".join(lines)
