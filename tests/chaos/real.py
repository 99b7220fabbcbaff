"""Chaos for real: seeded faults at random moments of whole sweeps, each compared with an undisturbed one.

    python -m tests.chaos.real --seeds 20 [--first 1] [--folder FOLDER] [--log FILE]

A seed fixes which faults are drawn and how long is waited before each, not how fast the machine is: what they meet is told.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import NAME, DisturbedSweep, Hit
from tests.outcomes import Outcome, differences, outcome_of, unclean

LONGEST_WAIT_S = 40.0
"""Before a fault, from the start or from the fault before it."""
PATIENCE_S = 45.0
"""How long to wait for something that the fault can hit, before another is drawn."""
GOES_ON_S = 900.0
"""How long a disturbed sweep may take to its end, on a machine that does other things too."""
MOST_TRIES = 3
"""A sweep that was through before all its faults were done is begun again with shorter waits."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault: what it hits, how, and what the driver's exit code then is."""

    kind: str
    number: signal.Signals = signal.SIGKILL
    twice: bool = False
    codes: tuple[int, ...] = ()
    """Empty: the driver goes on by itself."""

    def __str__(self) -> str:
        return f"{self.number.name} {'twice ' if self.twice else ''}{self.kind}"


FAULTS = [
    Fault("training worker"),
    Fault("training worker", signal.SIGTERM),
    Fault("train controller"),
    Fault("trial driver"),
    Fault("evaluation actor"),
    Fault("tracker"),
    Fault("driver", codes=(-signal.SIGKILL,)),
    Fault("driver", signal.SIGINT, codes=(130,)),
    Fault("driver", signal.SIGTERM, codes=(130,)),
    # the second may find Python on its way out, which then ends by the signal
    Fault("driver", signal.SIGINT, twice=True, codes=(130, -signal.SIGINT)),
    Fault("raylet", codes=(1,)),
]


@dataclass
class Verdict:
    """How one seed went."""

    seed: int
    hits: list[Hit] = field(default_factory=list)
    starts: int = 1
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = "identical" if not self.problems else "DIFFERENT"
        faults = "; ".join(map(str, self.hits))
        problems = "".join(f"\n    {problem}" for problem in self.problems)
        return f"seed {self.seed}: {outcome} after {self.seconds:.0f} s and {self.starts} starts: {faults}{problems}"


def run_seed(seed: int, folder: Path, cache: Path, expected: Outcome) -> Verdict:
    """A sweep in `folder` (removed when it ended well) that meets two or three faults, against what an undisturbed one came to."""
    for attempt in range(MOST_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        verdict = Verdict(seed)
        sweep = DisturbedSweep(folder, cache)
        try:
            draws = random.Random(seed)
            wanted = draws.choice((2, 3))
            _disturb(sweep, draws, wanted, LONGEST_WAIT_S / 2**attempt, verdict)
            if len(verdict.hits) == wanted or verdict.problems:
                break
        finally:
            verdict.seconds = sweep.elapsed
            sweep.stop()
    else:
        verdict.problems.append(f"only {len(verdict.hits)} faults met something before the sweep was through")
    if not verdict.problems:
        verdict.problems += _compare(sweep, expected)
    if not verdict.problems:
        shutil.rmtree(folder)
    return verdict


def _disturb(sweep: DisturbedSweep, draws: random.Random, wanted: int, longest_wait_s: float, verdict: Verdict) -> None:
    """Starts the sweep, lets the faults happen, and leaves when it has ended well or can no longer."""
    sweep.start()
    while len(verdict.hits) < wanted:
        fault = draws.choice(FAULTS)
        _wait(draws.uniform(0, longest_wait_s), lambda: sweep.driver.poll() is not None)
        is_early = sweep.find("raylet") is None  # a driver that is ended before its Ray runs ends in Python's own way
        hit = _inject(sweep, fault)
        if hit is None:
            if sweep.driver.poll() is None:
                continue  # nothing to hit: drawn again
            break
        verdict.hits.append(hit)
        if fault.codes:
            code = sweep.finish(within_s=300)
            if code not in fault.codes and not is_early:
                verdict.problems.append(f"exit code {code} after {fault}:\n{sweep.output()[-2000:]}")
                return
            sweep.start()
            verdict.starts += 1
    code = sweep.finish(within_s=GOES_ON_S)
    if code:
        verdict.problems.append(f"exit code {code} at the end:\n{sweep.output()[-2000:]}")


def _inject(sweep: DisturbedSweep, fault: Fault) -> Hit | None:
    """Hits what the fault is for as soon as that is there with work left; None where it is not there in good time."""
    found: list[Hit] = []

    def is_over() -> bool:
        if sweep.driver.poll() is None and (hit := sweep.hit(fault.kind, fault.number)) is not None:
            found.append(hit)
        return bool(found) or sweep.driver.poll() is not None

    _wait(PATIENCE_S, is_over)
    if found and fault.twice:
        time.sleep(0.3)
        sweep.driver.send_signal(fault.number)
    return found[0] if found else None


def _wait(at_most_s: float, is_over: Callable[[], bool]) -> None:
    until = time.monotonic() + at_most_s
    while not is_over() and time.monotonic() < until:
        time.sleep(0.1)


def _compare(sweep: DisturbedSweep, expected: Outcome) -> list[str]:
    problems = [f"left running: {left}" for left in sweep.leftovers()]
    try:
        problems += differences(outcome_of(sweep.storage.root, NAME), expected)
    except AssertionError as wrong:
        problems.append(str(wrong))
    problems += [f"half written: {path}" for path in unclean(sweep.storage.root)]
    if "Traceback" in sweep.output():
        problems.append(f"a traceback on the terminal:\n{sweep.output()[-2000:]}")
    return problems


def undisturbed_outcome(folder: Path, cache: Path) -> Outcome:
    """What the sweep comes to without faults."""
    sweep = DisturbedSweep(folder, cache)
    try:
        sweep.run_to_the_end(within_s=GOES_ON_S)
    finally:
        sweep.stop()
    return outcome_of(sweep.storage.root, NAME)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a sweep came to anything else than the undisturbed one."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.real", description="Faults at random moments of whole sweeps.")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--folder", type=Path, help="where sweeps are run; those that differ are kept (default: a new temporary folder)")
    parser.add_argument("--log", type=Path, help="a file that every line is also added to")
    given = parser.parse_args(arguments)
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="jmedlora-chaos-"))).resolve()

    def tell(line: str) -> None:
        print(line, flush=True)
        if given.log:
            with given.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")

    tell(f"in {folder}")
    shutil.rmtree(folder / "undisturbed", ignore_errors=True)
    began = time.monotonic()
    expected = undisturbed_outcome(folder / "undisturbed", folder / "cache")
    tell(f"undisturbed: {time.monotonic() - began:.0f} s")
    different = 0
    for seed in range(given.first, given.first + given.seeds):
        verdict = run_seed(seed, folder / f"seed-{seed}", folder / "cache", expected)
        tell(str(verdict))
        different += bool(verdict.problems)
    tell(f"{given.seeds - different} of {given.seeds} seeds identical to the undisturbed sweep")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
