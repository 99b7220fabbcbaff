"""Checksums of adapter folders: whether they are whole, and what they are known by. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from jmedlora.config.digest import digest
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, REMOVED, WEIGHTS_ON_THEIR_WAY_OUT


class AdapterDamaged(Exception):
    """A file of an adapter folder is missing, or is not what its checksum says."""


def verify(folder: Path) -> None:
    """Raises AdapterDamaged unless every file of the folder is there with its size and SHA-256."""
    for name, facts in _checksums(folder).items():
        file = folder / name
        if not file.is_file():
            raise AdapterDamaged(f"{file}: missing{why_gone(folder)}")
        if _facts(file) != facts:
            raise AdapterDamaged(f"{file}: differs from its checksum")


def verify_what_is_left(folder: Path) -> None:
    """The same, except that weights which a keep rule has removed are not missed."""
    try:
        verify(folder)
    except AdapterDamaged:
        config = folder / ADAPTER_CONFIG
        known = _checksums(folder)[ADAPTER_CONFIG]
        if not why_gone(folder) or not config.is_file() or _facts(config) != known:
            raise


def why_gone(folder: Path) -> str:
    """What to add where weights are missing that a keep rule has removed; else empty."""
    gone = any((folder / name).is_file() for name in (REMOVED, WEIGHTS_ON_THEIR_WAY_OUT))
    return ": its weights were removed by a keep rule" if gone else ""


def adapter_digest(folder: Path) -> str:
    """Identity of an adapter's content (hex), from its checksums; equal for equal weights and config, wherever they lie."""
    return digest(_checksums(folder))


def _checksums(folder: Path) -> dict[str, dict[str, str | int]]:
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise AdapterDamaged(f"{folder / CHECKSUMS}: missing") from None
    except (ValueError, KeyError, TypeError):
        raise AdapterDamaged(f"{folder / CHECKSUMS}: not readable") from None
    if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(files):
        raise AdapterDamaged(f"{folder / CHECKSUMS}: incomplete")
    return files


def write_checksums(folder: Path) -> None:
    """Writes sizes and SHA-256 of an adapter's files into its folder."""
    files = {name: _facts(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _facts(file: Path) -> dict[str, str | int]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}
