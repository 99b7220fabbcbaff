"""Counter-based random numbers: a pure function of integers, the same with every library version."""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function over 64-bit words (uint64, any shape): every input bit moves every output bit."""
    mixed = words.astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def combine(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """A new key per counter below a key (uint64, shapes broadcast)."""
    with np.errstate(over="ignore"):
        return mix(key.astype(np.uint64) ^ mix(counter.astype(np.uint64) * _GOLDEN + _GOLDEN))


def key_from(*parts: object) -> np.ndarray:
    """A key (uint64, one-element array) from a few names and numbers."""
    text = "\x1f".join(str(part) for part in parts)
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], dtype="<u8").astype(np.uint64)
