"""Canonical JSON and the digests that identities are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

KEY_LENGTH = 12


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no blanks, UTF-8 as it is; a whole float is written as an integer.

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot say.
    """
    return json.dumps(_whole_floats_as_integers(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole_floats_as_integers(value: Any) -> Any:
    if isinstance(value, str):  # most values are
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _whole_floats_as_integers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_floats_as_integers(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256 over canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """SHA-256 over the canonical JSON of each row, a line each, in hex: independent of how the file was formatted."""
    total = hashlib.sha256()
    for row in rows:
        total.update(canonical_json(row).encode() + b"\n")
    return total.hexdigest()


def key_of(value: Any) -> str:
    """The short identity used in folder names: the first 12 hex digits of `digest`."""
    return digest(value)[:KEY_LENGTH]
