"""What tests that train in this process share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import write_rows


@pytest.fixture(scope="module")
def training_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the module's own, one thread, and ZeRO-3 that shards tiny weights as it does large ones."""
    import torch

    from jmedlora.training import engine
    from jmedlora.training.process import ensure_process_group

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(engine, "PERSISTENT_ELEMENTS", 0)
        torch.set_num_threads(1)
        ensure_process_group()
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to train on."""
    return write_rows(tmp_path_factory.mktemp("data"))
