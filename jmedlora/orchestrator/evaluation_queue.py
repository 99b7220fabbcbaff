"""Which evaluation comes next, without Ray: derived from storage as committed checkpoints x evaluations - finished ones.

A look at storage costs one listing of the runs, and one of the checkpoints of each run that has begun and is not complete,
however many evaluations there are; what is about to be started or copied is looked at once more.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from jmedlora.config.faults import BadInput
from jmedlora.evaluation.reuse import adopt_evaluation
from jmedlora.orchestrator.errors import told
from jmedlora.orchestrator.evaluation_lease import EvaluatedElsewhere, evaluation_lease
from jmedlora.orchestrator.ledger import Job, is_done, is_ready
from jmedlora.plan.checksums import AdapterDamaged, adapter_digest, verify
from jmedlora.plan.layout import RunFolder, Storage, step_name
from jmedlora.plan.lease import is_held
from jmedlora.plan.records import Record, read_metrics

MAX_ATTEMPTS = 3
"""Deaths of actors in a row that one evaluation may meet without getting further."""

JobId = tuple[str, int, str]
Content = tuple[str, str, str]
"""What a result depends on: base, digest of the adapter (empty for a bare base), evaluation_key."""


class EvaluationQueue:
    """The evaluations that are to be done, those under way, and what became of them.

    Equal adapters on an equal base are scored once: evaluations with the same content form a group, of which the first is
    handed out, and its result is copied to the others.
    """

    def __init__(self, jobs: Sequence[Job], storage: Storage):
        self.failures: dict[JobId, str] = {}
        """What could not be evaluated, and why."""
        self._storage = storage
        self._behind_address = {job.base.run_key for job in jobs if is_api(job)}
        self._unseen: dict[str, dict[int, list[Job]]] = {}  # run -> step -> evaluations whose checkpoint was not there yet
        self._groups: dict[Content, list[Job]] = {}
        self._ready: dict[str, dict[str, dict[Content, None]]] = {}  # base -> run of the first -> groups that can be handed out
        self._under_way: dict[JobId, Content] = {}
        self._computed: dict[Content, tuple[str, int]] = {}  # content -> (run_key, step) where its result is
        self._whole: set[tuple[str, int]] = set()  # checkpoints that were found to be what their checksums say
        self._deaths: dict[JobId, tuple[int, int]] = {}  # how far it got at best, deaths since
        self._alone: set[JobId] = set()  # what is tried by itself
        self._settled: list[Record] = []
        begun = self._begun()
        done = [job for job in jobs if job.run_key in begun and is_done(job, storage)]
        finished = set(map(job_id, done))
        self._put_back(job for job in jobs if job_id(job) not in finished)
        if self._unseen:
            digests: dict[tuple[str, int], str] = {}
            for job in done:
                place = (job.run_key, job.step)
                if place not in digests:
                    digests[place] = self._digest(job)
                self._computed[(job.base.run_key, digests[place], job.evaluation.evaluation_key)] = place

    # -- what there is

    def look(self) -> None:
        """Looks for checkpoints that have been committed since the last look."""
        begun = self._begun()
        for run_key in list(self._unseen):
            steps = self._unseen[run_key]
            names = _names_in(self._storage.run(run_key).checkpoints) if run_key in begun else set()
            for step in [step for step in steps if step == 0 or step_name(step) in names]:
                if is_ready(steps[step][0], self._storage):
                    self._enqueue(steps.pop(step))
            if not steps:
                del self._unseen[run_key]

    @property
    def has_ready(self) -> bool:
        """True where an evaluation could be handed out."""
        return bool(self._ready)

    def settled(self) -> list[Record]:
        """The metrics of evaluations that needed no actor, since last asked for: copied, or found done by another sweep."""
        settled, self._settled = self._settled, []
        return settled

    # -- one evaluation

    def take(self, resident: str, last_run: str, behind_address: bool, pack: int = 1) -> list[Job]:
        """Ready evaluations for one pair of hands: at most `pack` adapters of one base, with one and the same evaluation.

        Those that fit best where base `resident` is loaded, with the adapter of `last_run`; empty where there is none. A bare base
        is alone, and so is what has been in company of which something died. behind_address: for models behind an address, and for
        them alone.
        """
        while bases := [base for base in self._ready if (base in self._behind_address) == behind_address]:
            runs = self._ready[resident if resident in bases else bases[0]]
            first = next(iter(runs[last_run if last_run in runs else next(iter(runs))]))
            contents = [first] if pack == 1 else self._alike([content for contents in runs.values() for content in contents], first)
            if taken := [job for content in contents[:pack] if (job := self._claim(content))]:
                return taken
        return []

    def _alike(self, ready: list[Content], first: Content) -> list[Content]:
        """Of what is ready for one base, what can be evaluated at once: `first`, where that has to be alone, or the most there are."""
        if self._has_to_be_alone(first):
            return [first]
        together: dict[str, list[Content]] = {}
        for content in ready:
            if not self._has_to_be_alone(content):
                together.setdefault(content[2], []).append(content)
        return max(together.values(), key=len)

    def _has_to_be_alone(self, content: Content) -> bool:
        job = self._groups[content][0]
        return not job.step or job_id(job) in self._alone

    def _claim(self, content: Content) -> Job | None:
        """The first evaluation of a ready group, which then counts as under way, unless there is nothing to do any more."""
        job = self._groups[content][0]
        self._remove_ready(content, job)
        if is_ready(job, self._storage) and not is_done(job, self._storage) and self._content(job) == content:
            self._under_way[job_id(job)] = content
            return job
        self._regroup(content)  # another sweep has done it, or its run has started over
        return None

    def finished(self, job: Job, metrics: Record) -> None:
        """Told that the result is stored; evaluations of equal adapters are settled with it."""
        content = self._under_way.pop(job_id(job))
        self._groups[content].remove(job)
        if job.step:
            self._computed[(job.base.run_key, metrics["adapter_digest"], job.evaluation.evaluation_key)] = (job.run_key, job.step)
        self._regroup(content)

    def failed(self, job: Job, why: str) -> None:
        """Told that it cannot be done; one that lost its checkpoint, since its run has started over, waits until it comes again."""
        content = self._under_way.pop(job_id(job))
        if is_ready(job, self._storage):
            self.failures[job_id(job)] = why
            self._groups[content].remove(job)
        self._regroup(content)

    def died(self, job: Job, why: str, progress: int, in_company: bool = False) -> None:
        """Told that its actor died. progress: how far it had got, in whatever is kept of it for the next attempt.

        in_company: others were in the same hands, and it is not known whose fault it was. What dies so again without having got
        further is tried by itself, with attempts of its own.
        """
        best, deaths = self._deaths.get(job_id(job), (0, 0))
        deaths = 1 if progress > best else deaths + 1
        if in_company and deaths > 1:
            self._alone.add(job_id(job))
            deaths = 0
        self._deaths[job_id(job)] = max(best, progress), deaths
        if deaths >= MAX_ATTEMPTS:
            self.failed(job, f"given up after {MAX_ATTEMPTS} attempts: {why}")
        else:
            self._regroup(self._under_way.pop(job_id(job)))

    def apart(self, jobs: Sequence[Job]) -> None:
        """Told that they cannot be done at once: each is tried by itself."""
        self._alone |= set(map(job_id, jobs))
        for job in jobs:
            self._regroup(self._under_way.pop(job_id(job)))

    def postponed(self, job: Job) -> None:
        """Told that another sweep is at it: the next look takes it in again."""
        self._put_back(self._groups.pop(self._under_way.pop(job_id(job))))

    def damaged(self, job: Job, why: str) -> None:
        """Told that its checkpoint is not what its checksums say: set aside, so that its run counts as unfinished, or read once more."""
        if not _set_aside(self._storage.run(job.run_key), job.step):
            self.died(job, why, progress=0)  # it was being written anew
            return
        content = self._under_way.pop(job_id(job))
        self.failures[job_id(job)] = f"{why}; it is set aside, and the next start of the sweep makes it again"
        self._groups[content].remove(job)
        self._regroup(content)

    # -- groups

    def _regroup(self, content: Content) -> None:
        """Looks anew at the evaluations of a group that is neither ready nor under way."""
        for job in self._groups.pop(content):
            if is_ready(job, self._storage):
                self._enqueue([job])
            else:
                self._put_back([job])

    def _put_back(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._unseen.setdefault(job.run_key, {}).setdefault(job.step, []).append(job)

    def _enqueue(self, jobs: Iterable[Job]) -> None:
        """Evaluations whose checkpoint is there: settled at once where the result is, else put into their group."""
        for job in jobs:
            content = self._content(job)
            if content in self._groups:
                self._groups[content].append(job)
            elif not self._settle(job, content):
                self._groups[content] = [job]
                self._ready.setdefault(job.base.run_key, {}).setdefault(job.run_key, {})[content] = None

    def _remove_ready(self, content: Content, first: Job) -> None:
        runs = self._ready[first.base.run_key]
        del runs[first.run_key][content]
        if not runs[first.run_key]:
            del runs[first.run_key]
        if not runs:
            del self._ready[first.base.run_key]

    def _settle(self, job: Job, content: Content) -> bool:
        """True where nothing is left to do: another sweep has done it, or an equal adapter's result could be copied, or not."""
        try:
            if metrics := read_metrics(self._storage, job.run_key, job.step, job.evaluation):
                self._computed[content] = (job.run_key, job.step)
                self._settled.append(metrics)
                return True
            if not self._is_computed(content, job):
                return False
            with evaluation_lease(self._storage, job.run_key, job.step, job.evaluation):
                self._settled.append(adopt_evaluation(self._storage, job.evaluation, self._computed[content], (job.run_key, job.step)))
        except EvaluatedElsewhere:
            return False
        except (BadInput, OSError) as error:  # a damaged file of an earlier start; a full disk
            self.failures[job_id(job)] = told(error)
        return True

    def _is_computed(self, content: Content, job: Job) -> bool:
        """True where a result of just this content can be copied: a run that has started over may have changed since it was scored.

        Not to a checkpoint that is damaged: whoever opens it tells.
        """
        if not job.step or content not in self._computed or not self._is_whole(job):
            return False
        try:
            metrics = read_metrics(self._storage, *self._computed[content], job.evaluation)
        except BadInput:
            return False
        return metrics is not None and metrics.get("adapter_digest") == content[1]

    def _is_whole(self, job: Job) -> bool:
        place = (job.run_key, job.step)
        if place not in self._whole and not self._storage.run(job.run_key).is_removed(job.step):
            try:
                verify(self._storage.run(job.run_key).checkpoint(job.step))
            except AdapterDamaged:
                return False
        self._whole.add(place)
        return True

    def _content(self, job: Job) -> Content:
        return job.base.run_key, self._digest(job), job.evaluation.evaluation_key

    def _digest(self, job: Job) -> str:
        """Identity of the adapter; of one that cannot be told, a name of its own: whoever opens it tells what is wrong."""
        if not job.step:
            return ""
        try:
            return adapter_digest(self._storage.run(job.run_key).checkpoint(job.step))
        except AdapterDamaged:
            return f"unknown: {job.run_key} {job.step}"

    def _begun(self) -> set[str]:
        return _names_in(self._storage.root / "runs")


def is_api(job: Job) -> bool:
    """True where a model behind an address is asked."""
    return job.base.precision == "api"


def job_id(job: Job) -> JobId:
    return job.run_key, job.step, job.evaluation.folder


def _set_aside(folder: RunFolder, step: int) -> bool:
    """Hides a checkpoint that is damaged; False where it is whole, or in the hands of a worker that trains its run, or of a keep rule."""
    checkpoint = folder.checkpoint(step)
    try:
        verify(checkpoint)
    except AdapterDamaged:
        if is_held(folder) or folder.is_removed(step) or not checkpoint.is_dir():
            return False
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}-damaged-{uuid.uuid4().hex[:8]}"))
        return True
    return False


def _names_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()
