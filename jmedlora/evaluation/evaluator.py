"""Scoring checkpoints on benchmarks with one resident base model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora import __version__
from jmedlora.config.parts import Engine, ModelConfig, Precision
from jmedlora.evaluation.generation import decode_together
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.likelihood import weigh_choices
from jmedlora.evaluation.resident import Resident
from jmedlora.evaluation.results import Answers, Checkpoint, Outcome, write_results
from jmedlora.evaluation.tasks import Task, make_task
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.identity import model_identity
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class CheckpointEvaluator(ABC):
    """Scores checkpoints of adapters to one base model: all but how the base answers with them, which is the engine's part."""

    engine: ClassVar[Engine]
    _spare_tokens: ClassVar[int] = 0
    """Positions that the engine needs behind a choice that is weighed."""
    _base: PreTrainedModel
    """Tells names and shapes of layers and the number of positions; whether it has weights is the engine's affair."""
    _tokenizer: PreTrainedTokenizerBase
    device: torch.device

    def __init__(self, identity: dict[str, Any], libraries: dict[str, str], sources: Path):
        """identity: the base model and how it is held, as JSON. libraries: versions of what answers depend on."""
        self._base_facts = {
            "engine": self.engine,
            **identity,
            "versions": {"jmedlora": __version__, **libraries},
            "device": self._device_name(),
        }
        self._sources = sources
        self._tasks: dict[str, Task] = {}

    @abstractmethod
    def _load(self, together: Sequence[Checkpoint], task: Task, storage: Storage) -> dict[Checkpoint, str | Exception | None]:
        """Makes checkpoints, or the bare base, ready to answer: of each its digest (of a bare base None), or what keeps it out."""

    @abstractmethod
    def _answers(
        self, task: Task, evaluation: EvaluationSpec, journals: Sequence[Journal], on_batch: Callable[[int], None] | None
    ) -> list[tuple[Answers, int]]:
        """The answers of each adapter that is ready, a journal each, and the tokens that were generated or weighed."""

    def evaluate(
        self,
        run_key: str,
        step: int,
        evaluation: EvaluationSpec,
        storage: Storage,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Score the checkpoint of `run_key` after `step` steps, or the bare base model where `step` is 0.

        The rest as in `evaluate_together`, but that whatever is wrong is raised.
        """
        [outcome] = self.evaluate_together([Checkpoint(run_key, step)], evaluation, storage, 1, on_progress)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def evaluate_together(
        self,
        checkpoints: Sequence[Checkpoint],
        evaluation: EvaluationSpec,
        storage: Storage,
        pack: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Outcome]:
        """Score checkpoints (with step 0: the bare base model), at most `pack` adapters at once; of each its metrics, or what is wrong.

        Writes predictions.jsonl, then metrics.json, into each evaluation's folder. Answers are generated or choices weighed, as
        the evaluation says. `on_progress(done, total)` is called with numbers of questions, of all checkpoints. Goes on from the
        answers that a start which was killed has left.
        What is wrong with one checkpoint, and stops no other: AdapterDamaged when it is not what its checksums say,
        AdapterDoesNotFit, AdapterHasNoEffect, OSError when its results cannot be written. Raises BadInput when the benchmark does
        not fit the evaluation, and torch.OutOfMemoryError when memory does not suffice for the adapters and one prompt.
        """
        started = time.perf_counter()
        task = self._task(evaluation)
        outcomes: dict[Checkpoint, Outcome] = {}
        for together in _packs(list(dict.fromkeys(checkpoints)), pack):
            before = len(outcomes) * len(task.questions)
            total = len(checkpoints) * len(task.questions)
            on_batch = partial(_told, on_progress, before, total) if on_progress else None
            outcomes |= self._evaluate(together, task, evaluation, storage, started, on_batch)
            started = time.perf_counter()
        return [outcomes[checkpoint] for checkpoint in checkpoints]

    def _evaluate(
        self,
        together: Sequence[Checkpoint],
        task: Task,
        evaluation: EvaluationSpec,
        storage: Storage,
        started: float,
        on_batch: Callable[[int], None] | None,
    ) -> dict[Checkpoint, Outcome]:
        """The outcomes of checkpoints whose adapters are resident at once, or of the base alone."""
        loaded = self._load(together, task, storage)
        outcomes: dict[Checkpoint, Outcome] = {each: digest for each, digest in loaded.items() if isinstance(digest, Exception)}
        digests = {each: digest for each, digest in loaded.items() if not isinstance(digest, Exception)}
        if not digests:
            return outcomes
        share = 1 / len(digests)
        journals = {
            each: Journal(storage, *each, evaluation, {"adapter": digest, "asked": task.digest, **self._base_facts}, started, share)
            for each, digest in digests.items()
        }
        with ExitStack() as unfinished:
            for journal in journals.values():
                unfinished.push(journal)
            answered = self._answers(task, evaluation, list(journals.values()), on_batch)
            unfinished.pop_all()
        seconds = share * (time.perf_counter() - started)
        for (checkpoint, journal), (answers, new_tokens) in zip(journals.items(), answered, strict=True):
            facts = {
                "adapter_digest": digests[checkpoint],
                "prompt_tokens": task.prompts.tokens,
                "new_tokens": new_tokens,
                "truncated_prompts": task.prompts.truncated,
                "batch_size": journal.batch_size,
                "pack": len(digests),
                "seconds": journal.earlier_s + seconds,
                "engine": self.engine,
                "device": self._device_name(),
            }
            try:
                with journal:
                    outcomes[checkpoint] = write_results(storage, *checkpoint, evaluation, task.questions, answers, facts)
            except Exception as error:  # the others' results can be written
                outcomes[checkpoint] = error
        return outcomes

    def _task(self, evaluation: EvaluationSpec) -> Task:
        """The benchmark's questions and prompts, read and encoded once per evaluation."""
        if evaluation.evaluation_key not in self._tasks:
            self._tasks[evaluation.evaluation_key] = make_task(evaluation, self._tokenizer, self._base, self._sources, self._spare_tokens)
        return self._tasks[evaluation.evaluation_key]

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


class Evaluator(CheckpointEvaluator):
    """Holds one base model at one precision and scores checkpoints of adapters to it.

    Adapters come and go beside the base's weights, which are neither merged nor reloaded; several can be there at once, and the
    last ones stay, since several evaluations of the same checkpoints usually follow each other.
    """

    engine = "transformers"

    def __init__(
        self,
        model: ModelConfig,
        precision: Precision,
        compute_precision: Literal["fp32", "bf16"],
        double_quantisation: bool,
        sources: Path,
        offline: bool,
        device: str | None = None,
    ):
        """Loads the base; `device` is the first GPU, or the CPU where there is none, unless given."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = materialise(model, sources, offline)
        self._tokenizer = load_tokenizer(folder)
        self._base = load_base(folder, precision, compute_precision, double_quantisation, self.device)
        held = (precision, compute_precision, double_quantisation)
        super().__init__(identity_of(model, folder, *held), {library: version(library) for library in _LIBRARIES}, sources)
        self._resident = Resident(self._base, self.device)

    def _load(self, together: Sequence[Checkpoint], task: Task, storage: Storage) -> dict[Checkpoint, str | Exception | None]:
        """Makes the checkpoints resident: of each its digest (of a bare base None), or what keeps it out."""
        if not together[0].step:
            self._resident.unload()
            return {together[0]: None}
        folders = [storage.run(each.run_key).checkpoint(each.step) for each in together]
        return dict(zip(together, self._resident.load(folders, task.prompts.token_ids[0]), strict=True))

    def _answers(
        self, task: Task, evaluation: EvaluationSpec, journals: Sequence[Journal], on_batch: Callable[[int], None] | None
    ) -> list[tuple[Answers, int]]:
        """The answers of each resident adapter, and the tokens that were generated or weighed."""
        if evaluation.scoring == "loglikelihood":
            weighed = weigh_choices(self._resident, task.prompts, task.choices, evaluation.batch_size, journals, on_batch)
            return [(Answers([], own), sum(sum(each.tokens) for each in own)) for own in weighed]
        generated = decode_together(
            self._resident,
            self._tokenizer,
            task.prompts,
            evaluation.max_new_tokens,
            evaluation.batch_size,
            journals,
            on_batch,
            evaluation.prompt.answer_marker,
        )
        return [(Answers(own.texts, []), own.new_tokens) for own in generated]


def identity_of(model: ModelConfig, folder: Path, *held: Any) -> dict[str, Any]:
    """What is told of a base model, beside engine and libraries. held: number formats of weights and activations, double quantisation."""
    # the folder's name: of a model from the hub its commit
    return {"model": model_identity(model, folder), "folder": folder.name, "precision": list(held)}


def _packs(checkpoints: Sequence[Checkpoint], size: int) -> Iterator[Sequence[Checkpoint]]:
    """Checkpoints whose adapters are resident at once; a bare base by itself."""
    for checkpoint in checkpoints:
        if not checkpoint.step:
            yield [checkpoint]
    adapters = [each for each in checkpoints if each.step]
    for start in range(0, len(adapters), size):
        yield adapters[start : start + size]


def _told(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)
