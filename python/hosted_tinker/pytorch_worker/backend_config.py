"""The keys of --backend-config (docs/backend-config.md)."""

import dataclasses
import json

from hosted_tinker.pytorch_worker.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    micro_batch_tokens: int = 2048  # most tokens of a padded micro-batch of several datums
    max_sampling_sequences: int = 64  # most samples of a request that are decoded at once
    gradient_checkpointing: bool = False
    dtype: str = ""  # float32 on a CPU, bfloat16 on CUDA
    train_gpus: tuple[int, ...] = ()  # the first GPU when there is one
    device_map: str = ""  # "auto": the layers are spread over train_gpus
    trust_remote_code: bool = False


def _refuse(key: str, value, allowed: str):
    raise UserError(f"backend config: {key} is {json.dumps(value)}, allowed are {allowed}")


def _integer(key: str, value, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(key, value, f"whole numbers from {low} to {high}")
    return value


def _boolean(key: str, value) -> bool:
    if not isinstance(value, bool):
        _refuse(key, value, "true and false")
    return value


def _one_of(key: str, value, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        _refuse(key, value, ", ".join(allowed))
    return value


def _gpus(key: str, value) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else []
    if not parts or not all(part.strip().isdecimal() for part in parts):
        _refuse(key, value, 'device numbers such as "0" or "0,1,2,3"')
    gpus = tuple(int(part) for part in parts)
    if len(set(gpus)) != len(gpus):
        _refuse(key, value, "each device once")
    return gpus


_READERS = {
    "micro_batch_tokens": lambda key, value: _integer(key, value, 1, 2**31 - 1),
    "max_sampling_sequences": lambda key, value: _integer(key, value, 1, 65536),
    "gradient_checkpointing": _boolean,
    "dtype": lambda key, value: _one_of(key, value, DTYPES),
    "train_gpus": _gpus,
    "device_map": lambda key, value: _one_of(key, value, ("auto",)),
    "trust_remote_code": _boolean,
}


def parse(text: str) -> BackendConfig:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"backend config: not a JSON object: {text[:200]}")
    fields = {}
    for key, entry in value.items():
        if key not in _READERS:
            raise UserError(f"backend config: unknown key {key}, allowed are {', '.join(_READERS)}")
        fields[key] = _READERS[key](key, entry)
    config = BackendConfig(**fields)
    if len(config.train_gpus) > 1 and not config.device_map:
        raise UserError('backend config: several train_gpus need "device_map": "auto"')
    return config
