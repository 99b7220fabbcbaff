"""The training and evaluation cores in one warm process, against Trainer and PEFT in another: `warm-tiny`, `warm-small`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.exactness import same_start
from tests.bench.measuring import Arm, Row, Taken, in_turns, row_of
from tests.bench.sweeps import ROOT, same_scores
from tests.bench.workload import Workload


@contextmanager
def warm(arm: str, workload: Workload) -> Iterator[Arm]:
    """An arm of `tests.bench.warm`, in a process that stays until the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.warm", arm, str(workload.folder)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def turn() -> Taken:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
        return Taken(told["seconds"], told)

    try:
        yield turn
    finally:
        process.kill()
        process.wait()


def compared(name: str, workload: Workload, pairs: int) -> list[Row]:
    """The row, with two runs that both arms' code trains from the same adapters over the same rows."""
    with warm("ours", workload) as mine, warm("plain", workload) as plain:
        exactness = same_start(workload)  # after they were started: DeepSpeed leaves variables in the environment
        ours, others = in_turns([mine, plain], pairs)
    training = " and ".join(f"{taken[-1].found['training_s']:.1f} s" for taken in (ours, others))
    notes = [f"of it training, ours and theirs: {training}", f"timed: {same_scores(ours[-1].found, others[-1].found)}"]
    return [row_of(name, "B1", ours, others, exactness, notes=notes)]
