"""Faults for real: a sweep as a user starts it, in processes of its own, any of which can be ended at any moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan, RunSpec
from jmedlora.plan.writing import read_plan

ROOT = Path(__file__).parents[1]
NAME = "faults"
SWEEP = """\
note: Synthetic sample data and random weights; not for clinical use.
grid: {model: [tiny-llama], method: [lora], rank: [4, 8], max_steps: [300]}
data: sample
benchmarks: [sample]
shots: [0]
prompts: [alpaca-ja]
training: {learning_rate: 3e-5, schedule: cosine, warmup_steps: 5, dropout: 0.1, batch_size: 4, max_input_tokens: 128}
evaluate: {every: 100, scoring: [generate, loglikelihood], max_new_tokens: 256, batch_size: 2}
resources: local
pack: 1
"""
"""Two runs over one base, long enough in training and decoding that faults hit in the middle of either."""

TITLES = {
    "training worker": r"ray::RayTrainWorker",
    "train controller": r"ray::TrainController",
    "trial driver": r"ray::ImplicitFunc",
    "evaluation actor": r"ray::EvaluationActor",
    "tracker": r"ray::TrackerActor",
    "raylet": r"\S*/raylet/raylet ",
    "gcs": r"\S*/gcs/gcs_server ",
}
"""How the processes of a sweep call themselves, beside `driver`: the process of the command itself."""
STEPS_LEFT = 25
"""Optimizer steps that a run must have before it to count as in the middle: some tenths of a second."""


@dataclass(frozen=True)
class Hit:
    """A fault that met something alive with work left."""

    kind: str
    pid: int
    signal: str
    at: float
    """Seconds since the sweep was first started."""
    work: str

    def __str__(self) -> str:
        return f"{self.at:.1f}s {self.signal} {self.kind} ({self.work})"


class DisturbedSweep:
    """One sweep in a folder of its own; `start` it as often as its driver ends."""

    def __init__(self, folder: Path, cache: Path, *overrides: str, prefix: Sequence[str] = (), text: str = SWEEP):
        """cache: for JMEDLORA_CACHE; prefix: a command that the driver's command is given to, and that becomes it by `exec`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.yaml").write_text(text, encoding="utf-8")
        self.folder = folder
        self.storage = Storage(folder / "results")
        self._command = [*prefix, sys.executable, "-m", "jmedlora.cli", "sweep", f"./{NAME}.yaml", *overrides]
        unwanted = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.environment = {
            **inherited, "PYTHONPATH": str(ROOT), "JMEDLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        self._began = time.monotonic()
        self._sessions: list[int] = []
        self._driver: subprocess.Popen[bytes] | None = None
        self._plan: Plan | None = None

    # -- the driver

    def start(self) -> None:
        """Starts the driver in a session of its own, by which all that it starts is known; what it prints goes to a file of this start."""
        assert self._driver is None or self._driver.poll() is not None, "the driver still runs"
        with (self.folder / f"log-{len(self._sessions) + 1}.txt").open("wb") as log:
            self._driver = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # as from a terminal: whoever is started in the background by a shell ignores SIGINT, and so would its children
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self._sessions.append(self._driver.pid)

    @property
    def driver(self) -> subprocess.Popen[bytes]:
        assert self._driver is not None, "not started"
        return self._driver

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def output(self) -> str:
        """What the latest start has printed."""
        return (self.folder / f"log-{len(self._sessions)}.txt").read_text(encoding="utf-8", errors="replace")

    def finish(self, within_s: float = 900) -> int:
        """Waits for the driver's end; returns its exit code (negative: the signal that ended it)."""
        try:
            return self.driver.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver has not ended after {within_s:.0f} s:\n{self.output()[-4000:]}") from None

    def run_to_the_end(self, within_s: float = 900) -> str:
        """Starts the driver again, which has to end well; returns what it printed."""
        self.start()
        code = self.finish(within_s)
        assert code == 0, f"exit code {code}:\n{self.output()[-6000:]}"
        return self.output()

    def wait_for(self, condition: Callable[[], Any], what: str, within_s: float = 600) -> Any:
        """Polls until `condition` holds, and returns its value; fails when the driver ends before, or time is over."""
        deadline = time.monotonic() + within_s
        while not (value := condition()):
            assert self.driver.poll() is None, f"the driver ended ({self.driver.returncode}) before: {what}\n{self.output()[-6000:]}"
            assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}\n{self.output()[-4000:]}"
            time.sleep(0.1)
        return value

    # -- its processes

    def processes(self, of_this_start: bool = False) -> list[psutil.Process]:
        """All that this sweep has started, in any of its starts or in this one alone, and that is alive."""
        sessions = self._sessions[-1:] if of_this_start else self._sessions
        found = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) in sessions and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def find(self, kind: str) -> psutil.Process | None:
        """This start's process of a kind (TITLES, or `driver`), if there is one."""
        if kind == "driver":
            return psutil.Process(self.driver.pid) if self.driver.poll() is None else None
        for process in self.processes(of_this_start=True):
            try:
                if re.match(TITLES[kind], " ".join(process.cmdline())):
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def leftovers(self, within_s: float = 120) -> list[str]:
        """What is still alive some time after the driver's end; Ray's agents of a killed one take a minute."""
        psutil.wait_procs(self.processes(), timeout=within_s)
        return [str(process) for process in self.processes()]

    def stop(self) -> None:
        """Ends whatever is left of it."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    # -- how far it is

    @property
    def plan(self) -> Plan | None:
        """The plan as the first start has written it."""
        self._plan = self._plan or read_plan(self.storage, NAME)
        return self._plan

    def steps(self, run: RunSpec) -> int:
        """The last optimizer step of train.jsonl, whole lines alone."""
        path = self.storage.run(run.run_key).train_jsonl
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def status(self, run: RunSpec) -> str:
        path = self.storage.run(run.run_key).run_json
        return str(json.loads(path.read_text(encoding="utf-8"))["status"]) if path.is_file() else "waiting"

    def in_training(self, from_step: int = 1) -> tuple[RunSpec, int] | None:
        """The run that is in the middle of its steps, at `from_step` or later, and its step."""
        for run in self.plan.runs if self.plan else ():
            at = self.steps(run)
            if self.status(run) == "running" and from_step <= at <= run.total_steps - STEPS_LEFT:
                return run, at
        return None

    def evaluated(self) -> int:
        """Evaluations that are finished."""
        return len(list(self.storage.root.glob("runs/*/evaluations/*/step-*/metrics.json")))

    def in_decode(self) -> str | None:
        """An evaluation that has written answers to its journal and is not finished."""
        for journal in self.storage.root.glob("runs/*/evaluations/*/.*.partial.jsonl"):
            place = f"{journal.parents[2].name} {journal.parent.name} {journal.name.split('.')[1]}"
            try:
                written = journal.read_bytes().count(b"\n") - 1  # the first line says what the others are
            except FileNotFoundError:  # its results are there now
                continue
            if written > 0:
                return f"{place}, written {written} times"
        return None

    def is_complete(self) -> bool:
        plan = self.plan
        if plan is None:
            return False
        asked = sum(len(spec.checkpoint_steps) for spec in plan.runs) + len(plan.bases)
        return all(self.status(run) == "finished" for run in plan.runs) and self.evaluated() == asked * len(plan.evaluations)

    def work_left(self, kind: str) -> str:
        """What a process of a kind is in the middle of; empty where it has nothing to do."""
        if kind == "evaluation actor":
            return self.in_decode() or ""
        if kind in ("training worker", "train controller", "trial driver"):
            found = self.in_training()
            return f"{found[0].run_key} step {found[1]}" if found else ""
        return "" if self.is_complete() or self.plan is None else f"{self.evaluated()} evaluations done"

    # -- faults

    def hit(self, kind: str, number: signal.Signals = signal.SIGKILL) -> Hit | None:
        """Sends a signal to a process of a kind while it has work left; None where there is no such process or nothing left.

        The process is halted while that is looked at, so that what it was in the middle of is known.
        """
        process = self.find(kind) if self.work_left(kind) else None
        if process is None:
            return None
        try:
            process.suspend()
            work = self.work_left(kind)
            if work:
                process.send_signal(number)
            process.resume()
            if work and number == signal.SIGKILL and kind != "driver":
                process.wait(timeout=30)
        except psutil.NoSuchProcess:
            return None
        return Hit(kind, process.pid, number.name, self.elapsed, work) if work else None

    def hit_when_possible(self, kind: str, number: signal.Signals = signal.SIGKILL, within_s: float = 600) -> Hit:
        """Waits until there is something to hit."""
        found: Hit = self.wait_for(lambda: self.hit(kind, number), f"{number.name} to a {kind} with work left", within_s)
        return found
