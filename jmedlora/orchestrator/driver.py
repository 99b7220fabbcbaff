"""The driver of a sweep: from the plan to the report."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from contextlib import ExitStack
from dataclasses import dataclass

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import ConcurrencyLimiter
from rich.console import Console

from jmedlora.config.clock import now
from jmedlora.config.faults import first_line
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.atomic import write_text
from jmedlora.data.patience import when_there_is_room
from jmedlora.evaluation.rescoring import rescore_stored, stale_evaluations
from jmedlora.orchestrator.address import cluster_address
from jmedlora.orchestrator.environment import ON_HEAD
from jmedlora.orchestrator.errors import is_told_by, last_line
from jmedlora.orchestrator.evaluation_pool import EvaluationPool
from jmedlora.orchestrator.joining import check_cluster, joined_ray
from jmedlora.orchestrator.keeping import KeepingToRule, settle_rule, told
from jmedlora.orchestrator.ledger import Standing, all_jobs, run_status, standing
from jmedlora.orchestrator.locks import sweep_lock
from jmedlora.orchestrator.order import InOrder
from jmedlora.orchestrator.progress import ProgressDisplay
from jmedlora.orchestrator.rebuild import changes_of
from jmedlora.orchestrator.scheduling import remaining_trials
from jmedlora.orchestrator.stopping import INTERRUPTED, StopMarker, graceful
from jmedlora.orchestrator.tracker_actor import TrackerActor
from jmedlora.orchestrator.trials import SweepContext, run_trial
from jmedlora.plan.costs import concurrent_trials
from jmedlora.plan.fitting import hints_of
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.records import Record
from jmedlora.plan.retention import forget_removed
from jmedlora.plan.specs import Plan, TrialSpec
from jmedlora.plan.writing import write_plan
from jmedlora.report.writer import ReportFiles, write_report
from jmedlora.tracking.location import tracking_uri

log = logging.getLogger(__name__)

DONE, SOME_FAILED = 0, 1
CLOSE_TRACKING_S = 3700.0
"""Above what the tracker allows itself."""
TRIAL_DRIVER_DEATHS = 5
"""How often the process that starts a trial's workers may die; what it had done is in storage, and the next one goes on from there."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: the exit code, where it stands, what went wrong beside failed runs, and the report if one was written."""

    exit_code: int
    standing: Standing
    problems: list[str]
    report: ReportFiles | None = None


def run_sweep(config: SweepConfig, plan: Plan, address: str | None, console: Console) -> Outcome:
    """Trains and evaluates what storage does not hold yet, then writes the report.

    `address`: a Ray cluster; None: RAY_ADDRESS, or a Ray of its own on this machine.
    Raises HeldByAnother, and BadInput for an address or a cluster that cannot be used.
    """
    storage = Storage(config.storage_path)
    folder = storage.sweep(plan.sweep)
    was_closed = folder.closed.is_file() and folder.report.is_dir() and folder.plan_json.is_file()
    if was_closed and (state := standing(plan, storage)).is_complete and not stale_evaluations(plan, storage):
        if removed := settle_rule(config, plan, storage):
            console.print(told(removed), highlight=False)
        console.print(f"sweep {plan.sweep} is complete already: nothing to train, nothing to evaluate")
        return Outcome(DONE, state, [])
    with ExitStack() as stack:
        # another driver is told before Ray takes its time to start; in a new storage nothing is written before the cluster is checked
        begun = folder.ledger.is_dir()
        if begun:
            stack.enter_context(sweep_lock(config, plan.sweep, _on_lost))
        if rescored := rescore_stored(plan, storage):
            console.print(f"scored {rescored} stored evaluations anew: metric settings or exam rules have changed")
        joined = cluster_address(address)
        console.print(
            f"sweep {plan.sweep}: {len(plan.runs)} runs over {len(plan.bases)} bases, into {storage.root}", soft_wrap=True, highlight=False
        )
        stack.enter_context(joined_ray(config, joined, address))
        check_cluster(config, joined)
        if not begun:
            stack.enter_context(sweep_lock(config, plan.sweep, _on_lost))
        folder.closed.unlink(missing_ok=True)
        write_plan(config, plan, storage)
        if again := forget_removed(plan, storage):
            console.print(f"runs trained again, whose checkpoints a keep rule has removed and which are asked for anew: {len(again)}")
        driver = _Driver(config, plan, storage, console)
        try:
            return driver.run()
        except KeyboardInterrupt:
            return driver.stopped()


def _on_lost(why: str) -> None:
    """Another driver has the sweep now, or may have: this one stops with grace."""
    log.error("the sweep is not held any more: %s", why)
    os.kill(os.getpid(), signal.SIGINT)


class _Driver:
    def __init__(self, config: SweepConfig, plan: Plan, storage: Storage, console: Console):
        self.config, self.plan, self.storage, self.console = config, plan, storage, console
        self.jobs = all_jobs(plan)
        self.names = names_of(plan)
        self.tracker = TrackerActor.remote(plan, str(storage.root), tracking_uri(storage))  # type: ignore[attr-defined]
        self.marker = StopMarker(storage.sweep(plan.sweep), uuid.uuid4().hex[:8])
        self.context = SweepContext(
            plan=plan,
            storage_root=str(storage.root),
            sources=config.sources,
            offline=config.offline,
            resources=config.resources,
            tracker=self.tracker,
            names=self.names,
            marker=self.marker,
            hints=hints_of(plan, config),
        )

    def run(self) -> Outcome:
        trials = remaining_trials(self.plan, self.storage)
        lanes = self._concurrency()
        actors = self.config.resources.evaluation.actors
        with (
            graceful(self._ask_to_stop),
            ProgressDisplay(self.console, self.plan, self.storage, self.tracker, self.jobs, self.names, lanes, actors),
            KeepingToRule(self.plan, self.storage) as keeping,
        ):
            problems = self._train_and_evaluate(trials, lanes)
            if not self.marker.is_set() and (again := self._made_again()):
                problems = self._train_and_evaluate(again, lanes)
        if keeping.removed:
            self.console.print(told(keeping.removed), highlight=False)
        state = standing(self.plan, self.storage)
        if self.marker.is_set() and not state.is_complete:
            return self.stopped()
        self.marker.remove()
        report = when_there_is_room(lambda: write_report(self.plan, self.storage), "the report")
        status = "finished" if state.is_complete and not problems else "failed"
        problems += [f"MLflow: {problem}" for problem in self.close_tracking(status, report, changes_of(report, state.is_evaluated))]
        if state.is_complete and not problems:
            write_text(self.storage.sweep(self.plan.sweep).closed, f"{now()}\n")
            return Outcome(DONE, state, problems, report)
        return Outcome(SOME_FAILED, state, problems, report)

    def _made_again(self) -> list[TrialSpec]:
        """Trials of runs that wait once all is trained: a checkpoint of theirs turned out to be damaged when it was to be evaluated."""
        waiting = set(standing(self.plan, self.storage).runs["waiting"])
        return [trial for trial in self.plan.trials if any(run.run_key in waiting for run in trial.runs)]

    def stopped(self) -> Outcome:
        """The end of a sweep that was interrupted, with grace or at once."""
        problems = self.close_tracking("interrupted", None, [])
        self.marker.remove()
        return Outcome(INTERRUPTED, standing(self.plan, self.storage), [f"MLflow: {problem}" for problem in problems])

    def _ask_to_stop(self) -> None:
        try:
            self.marker.set()
            self.console.print("stopping: runs finish their step and save (once more: stop at once)", highlight=False)
        except OSError as error:  # workers cannot be told
            self.console.print(f"cannot ask the runs to stop: {error} (once more: stop at once)", highlight=False)

    def close_tracking(self, status: str, report: ReportFiles | None, changes: list[Record]) -> list[str]:
        """Lets the tracker write all that it was told, and how runs differ from their bases; returns what MLflow could not take."""
        try:
            return ray.get(self.tracker.finish.remote(status, str(report.folder) if report else None, changes), timeout=CLOSE_TRACKING_S)
        except RayError as error:
            return [f"{type(error).__name__}: not everything was written; `jmedlora report` shows what storage holds"]

    def _train_and_evaluate(self, trials: list[TrialSpec], lanes: int) -> list[str]:
        evaluation = self.config.resources.evaluation
        everything = {job.run_key for job in self.jobs}
        problems: list[str] = []
        if self.context.takes_turns:
            # the GPUs are free: bases first, trials score their own runs, and what they left is done at the end
            gpus = float(self.config.resources.gpus_per_worker)
            problems += self._drain(self.context.pool({base.run_key for base in self.plan.bases}, evaluation.cpus, gpus, evaluation.actors))
            problems += self._train(trials, lanes)
            return problems + self._drain(self.context.pool(everything, evaluation.cpus, gpus, evaluation.actors))
        pool = self.context.pool(everything, self._evaluation_cpus(), evaluation.gpus, evaluation.actors)
        training_is_over = threading.Event()
        errors: list[str] = []
        thread = threading.Thread(target=self._serve, args=(pool, training_is_over, errors), daemon=True)
        thread.start()
        problems += self._train(trials, lanes)
        training_is_over.set()
        thread.join()
        return problems + errors + self._told(pool)

    def _serve(self, pool: EvaluationPool, training_is_over: threading.Event, errors: list[str]) -> None:
        try:
            pool.serve(more_to_come=lambda: not training_is_over.is_set(), stopping=self.marker.is_set)
        except Exception as error:
            log.exception("the evaluation pool stopped")
            errors.append(f"evaluation stopped: {type(error).__name__}: {error}")

    def _drain(self, pool: EvaluationPool) -> list[str]:
        pool.serve(more_to_come=lambda: False, stopping=self.marker.is_set)
        return self._told(pool)

    def _told(self, pool: EvaluationPool) -> list[str]:
        """A line per checkpoint and reason, without what a failed run tells anyway."""
        by_cause: dict[tuple[str, int, str], list[str]] = {}
        for (run_key, step, folder), why in pool.failures.items():
            by_cause.setdefault((run_key, step, why), []).append(folder)
        errors = list(standing(self.plan, self.storage).errors.values())
        return [
            f"evaluation of {self.names[run_key]} at step {step} ({', '.join(folders)}): {why}"
            for (run_key, step, why), folders in by_cause.items()
            if not is_told_by(why, errors)
        ]

    def _train(self, trials: list[TrialSpec], lanes: int) -> list[str]:
        if not trials:
            return []
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, context=self.context), {"CPU": 0, **ON_HEAD}),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(InOrder([trial.trial_id for trial in trials], self.marker.is_set), max_concurrent=lanes),
                num_samples=len(trials),
            ),
            run_config=tune.RunConfig(
                name=f"tune-{uuid.uuid4().hex[:8]}",
                storage_path=str(self.storage.sweep(self.plan.sweep).ray),
                failure_config=tune.FailureConfig(max_failures=TRIAL_DRIVER_DEATHS),
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        except (RuntimeError, RayError) as error:  # Tune itself could not go on; what is stored is kept
            log.debug("Tune stopped", exc_info=True)
            return [f"training stopped: {first_line(error)}"]
        runs = {trial.trial_id: trial.runs for trial in trials}
        problems = []
        for result in results:
            if result.config is None:  # its process died before it began
                problems.append(f"a trial: {last_line(result.error)}")
                continue
            own = runs[result.config["trial_id"]]
            if result.error and not any(run_status(run, self.storage) == "failed" for run in own):  # which tell the same
                problems.append(f"trial of {', '.join(self.names[run.run_key] for run in own)}: {last_line(result.error)}")
        return problems

    def _concurrency(self) -> int:
        """Trials at once: by GPUs at the cluster's maximum; without GPUs, by the cores that evaluation leaves."""
        by_plan = concurrent_trials(self.config.resources)
        if by_plan is not None:
            return by_plan
        resources = self.config.resources
        free = ray.cluster_resources().get("CPU", 1) - self._evaluation_cpus() * resources.evaluation.actors
        return max(1, int(free // (resources.workers_per_trial * resources.cpus_per_worker)))

    def _evaluation_cpus(self) -> float:
        """Cores that an evaluation actor takes; none where the cluster could not hold it beside one trial."""
        resources = self.config.resources
        trial = resources.workers_per_trial * resources.cpus_per_worker
        needed = trial + resources.evaluation.actors * resources.evaluation.cpus
        return resources.evaluation.cpus if ray.cluster_resources().get("CPU", 0) >= needed or resources.gpus_per_worker else 0
