"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled within; afterwards synced to disk and put in the place of `folder`.

    When the block raises, nothing is left and what stood at `folder` stays. Parents are made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
