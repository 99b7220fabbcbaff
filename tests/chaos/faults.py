"""Faults of the simulation. Each waits from its moment on for something alive with work left, and strikes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmedlora.plan.layout import ADAPTER_WEIGHTS, CHECKSUMS, STATE_JSON, STATE_TENSORS, RunFolder
from jmedlora.plan.lease import is_held
from tests.chaos.world import Process, World

if TYPE_CHECKING:
    from tests.chaos.rig import Cluster
    from tests.chaos.simulation import Sweep

_KILLED_WITHIN = 40
"""A process that is to be killed has done up to so many more operations on files by then."""


@dataclass
class Fault:
    """One fault. `hit`: what it struck, empty until then."""

    kind: str
    moment: float
    hit: str = ""

    @property
    def is_done(self) -> bool:
        return bool(self.hit)

    def strike(self, world: World, cluster: Cluster, sweeps: list[Sweep]) -> None:
        self.hit = FAULTS[self.kind](world, cluster, sweeps) or ""
        if self.hit:
            world.tell(f"{self.kind}: {self.hit}")


def _kill(kind: str) -> Callable[[World, Cluster, list[Sweep]], str | None]:
    """Kills a process of some kind before one of its next operations on files."""

    def strike(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
        alive = [process for process in world.processes if process.kind.startswith(kind) and not process.is_over and not process.is_dead]
        busy = [process for process in alive if process.dies_at is None and cluster.is_busy(process)]
        if not busy:
            return None
        process = world.rng.choice(busy)
        process.dies_at = process.operations + world.rng.randint(1, _KILLED_WITHIN)
        return process.kind

    return strike


def _leave(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    """A worker is asked to go, as by SIGTERM."""
    workers = _workers(world)
    if not workers:
        return None
    cluster.leaving.add(world.rng.choice(workers))
    return "a worker"


def _stop(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    """A driver is asked to stop, as by Ctrl-C."""
    drivers = [sweep.process for sweep in sweeps if sweep.process is not None and sweep.process in cluster.stoppable]
    if not drivers:
        return None
    process = world.rng.choice(drivers)
    cluster.stoppable.pop(process)()
    return process.kind


def _fill_disk(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    seconds = world.rng.choice([0.01, 1, 5, 20]) * cluster.work.step_s
    world.full_until = world.seconds + seconds
    return f"for {seconds:g} s"


def _lose_mlflow(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    world.mlflow_away_for = world.rng.choice([1, 3, 10, 30])
    return f"for {world.mlflow_away_for} calls"


def _move_clock(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    shift = world.rng.choice([-86400.0, -3600.0, -1.0, 3600.0])
    world.clock_shift += shift
    return f"by {shift:g} s"


def _lose_power(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    world.lose_power()
    return "all processes"


def _damage_training(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    """The newest state or checkpoint of a run in training is damaged, and its worker killed."""
    places = [
        (process, files) for process in _workers(world) for folder in cluster.folders_in_hand(process) if (files := _damageable(folder))
    ]
    if not places:
        return None
    process, files = world.rng.choice(places)
    process.kill()
    return _damage(world, world.rng.choice(files))


def _damage_result(world: World, cluster: Cluster, sweeps: list[Sweep]) -> str | None:
    """A checkpoint that is still to be evaluated is damaged."""
    from jmedlora.orchestrator.ledger import all_jobs, is_done
    from jmedlora.plan.layout import Storage

    storage = Storage(world.root)
    jobs = {job for sweep in sweeps for job in _places(sweep)}
    waiting = {
        (job.run_key, job.step)
        for sweep in sweeps
        for job in all_jobs(sweep.plan)
        if job.step and not is_done(job, storage) and storage.run(job.run_key).is_committed(job.step)
    }
    untouched = sorted(place for place in waiting & jobs if not _is_partly_evaluated(storage.run(place[0]), place[1]))
    places = [
        place
        for place in untouched
        if not is_held(storage.run(place[0])) and storage.run(place[0]).checkpoint(place[1]) not in cluster.work.opened
    ]
    if not places:
        return None
    run_key, step = world.rng.choice(places)
    return _damage(world, storage.run(run_key).checkpoint(step) / world.rng.choice([ADAPTER_WEIGHTS, CHECKSUMS]))


def _places(sweep: Sweep) -> list[tuple[str, int]]:
    return [(run.run_key, step) for run in sweep.plan.runs for step in run.checkpoint_steps]


def _is_partly_evaluated(folder: RunFolder, step: int) -> bool:
    return any((each / f"step-{step:06d}").exists() for each in (folder.path / "evaluations").glob("*"))


def _workers(world: World) -> list[Process]:
    return [process for process in world.processes if process.kind == "worker" and not process.is_over and not process.is_dead]


def _damageable(folder: RunFolder) -> list[Path]:
    newest = [path for _, path in sorted(folder.states().items())[-1:]]
    found = [path / name for path in newest for name in (STATE_TENSORS, STATE_TENSORS, STATE_TENSORS, STATE_JSON)]
    found += [folder.checkpoint(step) / name for step in folder.committed_steps()[-1:] for name in (ADAPTER_WEIGHTS, CHECKSUMS)]
    return [path for path in found if path.is_file()]


def _damage(world: World, path: Path) -> str:
    """Cuts a file, or flips one of its bits."""
    content = bytearray(path.read_bytes())
    place = world.rng.randrange(len(content))
    if world.rng.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << world.rng.randrange(8)
    path.write_bytes(content)
    return str(path.relative_to(world.root))


FAULTS: dict[str, Callable[[World, Any, Any], str | None]] = {
    "kill worker": _kill("worker"),
    "kill trial": _kill("trial"),
    "kill evaluation actor": _kill("evaluation actor"),
    "kill tracker": _kill("tracker"),
    "kill driver": _kill("driver"),
    "worker leaves": _leave,
    "stop driver": _stop,
    "disk full": _fill_disk,
    "MLflow away": _lose_mlflow,
    "clock moved": _move_clock,
    "power lost": _lose_power,
    "damaged while training": _damage_training,
    "damaged result": _damage_result,
}
