"""The driver of a sweep: from the plan to the report."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import ray
from ray import tune
from ray.exceptions import RayError
from rich.console import Console

from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.sweep import SweepConfig
from jmedlora.evaluation.rescoring import rescore_stored, stale_evaluations
from jmedlora.orchestrator.address import cluster_address, refused
from jmedlora.orchestrator.environment import ON_HEAD
from jmedlora.orchestrator.errors import is_told_by, last_line
from jmedlora.orchestrator.evaluation_pool import EvaluationPool
from jmedlora.orchestrator.ledger import Standing, all_jobs, driver_lock, run_status, standing
from jmedlora.orchestrator.progress import ProgressDisplay
from jmedlora.orchestrator.tracker_actor import TrackerActor
from jmedlora.orchestrator.trials import SweepContext, run_trial
from jmedlora.plan.estimates import concurrent_trials
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.specs import Plan, TrialSpec
from jmedlora.plan.writing import write_plan
from jmedlora.report.writer import ReportFiles, write_report
from jmedlora.tracking.location import tracking_uri

log = logging.getLogger(__name__)

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
CLOSE_TRACKING_S = 300.0
_LOGGED = ("run_key", "evaluation_key", "step", "metric", "difference", "p", "p_holm")
"""What MLflow is told of a run's difference from its base."""


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
    is_complete = standing(plan, storage).is_complete and folder.report.is_dir() and folder.plan_json.is_file()
    if is_complete and not stale_evaluations(plan, storage):
        console.print(f"sweep {plan.sweep} is complete already: nothing to train, nothing to evaluate")
        return _outcome(plan, storage, [])
    with ExitStack() as stack:
        # another driver is told before Ray takes its time to start; in a new storage nothing is written before the cluster is checked
        begun = folder.ledger.is_dir()
        if begun:
            stack.enter_context(driver_lock(folder))
        if rescored := rescore_stored(plan, storage):
            console.print(f"scored {rescored} stored evaluations anew: metric settings or exam rules have changed")
        joined = cluster_address(address)
        console.print(
            f"sweep {plan.sweep}: {len(plan.runs)} runs over {len(plan.bases)} bases, into {storage.root}", soft_wrap=True, highlight=False
        )
        stack.enter_context(_ray(config, joined, address))
        _check_cluster(config, joined)
        if not begun:
            stack.enter_context(driver_lock(folder))
        write_plan(config, plan, storage)
        driver = _Driver(config, plan, storage, console)
        try:
            return driver.run()
        except KeyboardInterrupt:
            driver.close_tracking("interrupted", None)
            return Outcome(INTERRUPTED, standing(plan, storage), [])


@contextmanager
def _ray(config: SweepConfig, address: str | None, given: str | None) -> Iterator[None]:
    """Joins or starts Ray, and leaves it; SIGTERM counts as an interruption. Inside a process that has joined already, nothing is done."""
    if ray.is_initialized():
        yield
        return
    resources = config.resources
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interruption is ours to handle: Tune would go on to its own end
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with verbose=0, this one is silent
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # their causes are told at the end, a line each
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "jmedlora"}
    try:
        if address:
            try:
                ray.init(address=address, **common)
            except (ValueError, ConnectionError) as error:
                raise refused(given, address, first_line(error)) from None
        else:
            needed = resources.workers_per_trial * resources.cpus_per_worker + resources.evaluation.actors * resources.evaluation.cpus
            ray.init(address="local", include_dashboard=False, num_cpus=max(os.cpu_count() or 1, needed), **common)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, previous)


def _check_cluster(config: SweepConfig, address: str | None) -> None:
    """What only the cluster itself can tell; raises BadInput before anything is written."""
    faults = []
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and not os.environ.get("MLFLOW_TRACKING_URI"):
        faults.append(
            Fault(
                "environment",
                "MLFLOW_TRACKING_URI",
                f"not set, and the cluster has {nodes} nodes",
                "the address of an MLflow server: a sqlite file cannot be shared",
            )
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))
    needed = config.resources.workers_per_trial * config.resources.gpus_per_worker
    if nodes == 1 and needed > gpus and not address:
        faults.append(
            Fault(
                config.file,
                "resources.gpus_per_worker",
                f"a trial needs {needed} GPUs, this machine has {gpus}",
                f"at most {gpus}, or the address of a cluster",
            )
        )
    if faults:
        raise BadInput(faults)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Driver:
    def __init__(self, config: SweepConfig, plan: Plan, storage: Storage, console: Console):
        self.config, self.plan, self.storage, self.console = config, plan, storage, console
        self.jobs = all_jobs(plan)
        self.names = names_of(plan)
        self.tracker = TrackerActor.remote(plan, str(storage.root), tracking_uri(storage))  # type: ignore[attr-defined]
        self.context = SweepContext(
            plan=plan,
            storage_root=str(storage.root),
            sources=config.sources,
            offline=config.offline,
            resources=config.resources,
            tracker=self.tracker,
            names=self.names,
            attempt=uuid.uuid4().hex[:8],
        )
        self.training_is_over = threading.Event()

    def run(self) -> Outcome:
        trials = [trial for trial in self.plan.trials if any(run_status(run, self.storage) != "finished" for run in trial.runs)]
        lanes = self._concurrency()
        problems: list[str] = []
        actors = self.config.resources.evaluation.actors
        with ProgressDisplay(self.console, self.plan, self.storage, self.tracker, self.jobs, self.names, lanes, actors):
            problems += self._train_and_evaluate(trials, lanes)
        report = write_report(self.plan, self.storage)
        status = "finished" if _outcome(self.plan, self.storage, problems).exit_code == DONE else "failed"
        problems += [f"MLflow: {problem}" for problem in self.close_tracking(status, report)]
        return replace(_outcome(self.plan, self.storage, problems), report=report)

    def close_tracking(self, status: str, report: ReportFiles | None) -> list[str]:
        """Lets the tracker write all that it was told, and how runs differ from their bases; returns what MLflow could not take."""
        changes = [{key: getattr(row, key) for key in _LOGGED} for row in report.statistics.against_base] if report else []
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
        errors: list[str] = []
        thread = threading.Thread(target=self._serve, args=(pool, errors), daemon=True)
        thread.start()
        problems += self._train(trials, lanes)
        self.training_is_over.set()
        thread.join()
        return problems + errors + self._told(pool)

    def _serve(self, pool: EvaluationPool, errors: list[str]) -> None:
        try:
            pool.serve(more_to_come=lambda: not self.training_is_over.is_set())
        except Exception as error:
            log.exception("the evaluation pool stopped")
            errors.append(f"evaluation stopped: {type(error).__name__}: {error}")

    def _drain(self, pool: EvaluationPool) -> list[str]:
        pool.serve(more_to_come=lambda: False)
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
            param_space={"trial_id": tune.grid_search([trial.trial_id for trial in trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=lanes),
            run_config=tune.RunConfig(
                name=f"tune-{self.context.attempt}", storage_path=str(self.storage.sweep(self.plan.sweep).ray), verbose=0
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


def _outcome(plan: Plan, storage: Storage, problems: list[str]) -> Outcome:
    state = standing(plan, storage)
    return Outcome(DONE if state.is_complete and not problems else SOME_FAILED, state, problems)
