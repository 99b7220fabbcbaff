"""Being asked to stop: the marker in storage, signals, and the order of trials."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from jmedlora.config.faults import is_out_of_memory
from jmedlora.orchestrator import stopping
from jmedlora.orchestrator.errors import Refused, is_refusal
from jmedlora.orchestrator.order import InOrder
from jmedlora.orchestrator.stopping import StopMarker, graceful
from jmedlora.plan.layout import Storage


def test_a_marker_is_seen_from_another_process_and_belongs_to_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    folder = Storage(tmp_path).sweep("mine")
    marker, other_start = StopMarker(folder, "first"), StopMarker(folder, "second")
    elsewhere: StopMarker = pickle.loads(pickle.dumps(marker))
    assert not elsewhere.is_set()
    marker.set()
    assert marker.is_set() and elsewhere.is_set() and not other_start.is_set()
    marker.remove()
    assert list(folder.ledger.iterdir()) == []
    assert elsewhere.is_set(), "once asked, always asked"


def test_storage_is_looked_at_only_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Storage(tmp_path).sweep("mine")
    marker, elsewhere = StopMarker(folder, "first"), StopMarker(folder, "first")
    assert not elsewhere.is_set()
    marker.set()
    assert not elsewhere.is_set(), "looked a moment ago"
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    assert elsewhere.is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    asked: list[int] = []
    with graceful(lambda: asked.append(1)):
        os.kill(os.getpid(), number)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked == [1]
    assert signal.getsignal(number) == before


EARLY = """
import os, signal, sys
from jmedlora.orchestrator.stopping import check_interrupts, graceful, interruptible
interruptible()
for _ in range(int(sys.argv[2])):
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    except BaseException:
        pass  # as libraries do while they are imported
try:
    with graceful(lambda: None):
        print("went on")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_early_signal_is_not_lost_where_a_library_swallows_it(number: signal.Signals) -> None:
    found = [subprocess.run([sys.executable, "-c", EARLY, str(int(number)), times], capture_output=True, text=True) for times in "012"]
    assert [each.stdout for each in found] == ["went on\n", "interrupted\n", ""]
    assert [each.returncode for each in found] == [0, 0, 130]


def test_trials_come_in_order_until_the_sweep_is_to_stop() -> None:
    asked: list[int] = []
    order = InOrder(["a", "b", "c", "d"], is_stopping=lambda: bool(asked))
    assert [order.suggest("x")["trial_id"] for _ in range(3)] == ["a", "b", "c"]
    asked.append(1)
    assert order.suggest("x") == Searcher.FINISHED
    asked.clear()
    assert order.suggest("x") == {"trial_id": "d"}
    assert order.suggest("x") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", True),
        ("RuntimeError: CUDA error: out of memory", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("The actor died unexpectedly before finishing this task", False),
    ],
)
def test_what_ran_out_of_memory_is_told_apart(text: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is is_memory


def test_a_refusal_is_known_by_its_text() -> None:
    assert is_refusal(RuntimeError(f"Training failed due to worker errors:\n{Refused.__name__}: data sample: changed"))
    assert not is_refusal(RuntimeError("data sample: changed"))
