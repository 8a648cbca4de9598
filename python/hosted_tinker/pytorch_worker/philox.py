"""Counter-based random numbers, bit for bit those of src/base/philox.h and of the native engine."""

import numpy as np

SAMPLE, ALTERNATIVE = 0, 1  # DrawStream of engine/sampling/token_distribution.h

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter, key: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011). `counter`: four arrays (or numbers) of 32-bit words; so is the result."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(_M0) * c0, np.uint64(_M1) * c2
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = k0 + _W0 & 0xFFFFFFFF, k1 + _W1 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def draw_unit(seed: int, position: int, index: int, stream: int) -> float:
    """Uniform in [0, 1) with 53 bits."""
    words = philox4x32((position & 0xFFFFFFFF, index & 0xFFFFFFFF, stream, 0), seed)
    return float((int(words[0]) << 32 | int(words[1])) >> 11) * 2.0**-53


def hash_name(name: str) -> int:
    """FNV-1a, 64 bit."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def initial_lora_a(module: str, rank: int, in_features: int, seed: int) -> np.ndarray:
    """(rank, in_features) float32, uniform in ±1/sqrt(in_features): model_spec::initial_lora_a."""
    name, count = hash_name(module), rank * in_features
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    words = philox4x32((blocks & _LOW, blocks >> _32, name & 0xFFFFFFFF, name >> 32), seed)
    unit = (np.stack(words, axis=1).reshape(-1)[:count] >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
    bound = np.float32(1.0 / np.sqrt(np.float64(in_features)))
    return ((np.float32(2) * unit - np.float32(1)) * bound).reshape(rank, in_features)
