"""Scoring checkpoints on benchmarks with one resident base model."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from jmedlora import __version__
from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.parts import ModelConfig, Precision
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import target_of
from jmedlora.data.rows import LETTERS, Instruction, Question
from jmedlora.data.tokenisation import encode_choice, prompt_text
from jmedlora.evaluation.generation import EncodedPrompts, decode_together, encode_prompts, max_prompt_tokens
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.likelihood import weigh_choices
from jmedlora.evaluation.resident import Resident
from jmedlora.evaluation.results import Answers, Checkpoint, Outcome, asked_rows, write_results
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.identity import model_identity
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class _Task:
    """What a benchmark asks, ready for the model."""

    questions: list[Question]
    prompts: EncodedPrompts
    choices: list[list[list[int]]]
    """Token ids of each question's choices; empty where answers are generated."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all that the model is given."""
        return hashlib.sha256(json.dumps([self.prompts.token_ids, self.choices]).encode()).hexdigest()


class Evaluator:
    """Holds one base model at one precision and scores checkpoints of adapters to it.

    Adapters come and go beside the base's weights, which are neither merged nor reloaded; several can be there at once, and the
    last ones stay, since several evaluations of the same checkpoints usually follow each other.
    """

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
        self._base_facts = {
            "model": model_identity(model, folder),
            "folder": folder.name,  # of a model from the hub: its commit
            "precision": [precision, compute_precision, double_quantisation],
            "versions": {"jmedlora": __version__, **{library: version(library) for library in _LIBRARIES}},
            "device": self._device_name(),
        }
        self._sources = sources
        self._resident = Resident(self._base, self.device)
        self._tasks: dict[str, _Task] = {}

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
        task: _Task,
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
                "device": self._device_name(),
            }
            try:
                with journal:
                    outcomes[checkpoint] = write_results(storage, *checkpoint, evaluation, task.questions, answers, facts)
            except Exception as error:  # the others' results can be written
                outcomes[checkpoint] = error
        return outcomes

    def _load(self, together: Sequence[Checkpoint], task: _Task, storage: Storage) -> dict[Checkpoint, str | Exception | None]:
        """Makes the checkpoints resident: of each its digest (of a bare base None), or what keeps it out."""
        if not together[0].step:
            self._resident.unload()
            return {together[0]: None}
        folders = [storage.run(each.run_key).checkpoint(each.step) for each in together]
        return dict(zip(together, self._resident.load(folders, task.prompts.token_ids[0]), strict=True))

    def _answers(
        self, task: _Task, evaluation: EvaluationSpec, journals: Sequence[Journal], on_batch: Callable[[int], None] | None
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

    def _task(self, evaluation: EvaluationSpec) -> _Task:
        """The benchmark's questions and prompts, read and encoded once per evaluation."""
        if evaluation.evaluation_key not in self._tasks:
            questions, examples = asked_rows(evaluation, load_benchmark(evaluation.benchmark, self._sources))
            rows = [question.as_instruction() for question in questions]
            texts = [prompt_text(self._tokenizer, evaluation.prompt, row, examples) for row in rows]
            choices = []
            room = evaluation.max_new_tokens
            if evaluation.scoring == "loglikelihood":
                choices = [[encode_choice(self._tokenizer, text) for text in _choice_targets(evaluation.prompt, row)] for row in rows]
                room = max(len(ids) for own in choices for ids in own)
            prompts = encode_prompts(self._tokenizer, texts, max_prompt_tokens(self._base, room), evaluation.prompt.chat)
            self._tasks[evaluation.evaluation_key] = _Task(questions, prompts, choices)
        return self._tasks[evaluation.evaluation_key]

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


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


def _choice_targets(prompt: PromptConfig, row: Instruction) -> list[str]:
    """What would follow the prompt for each choice, were it the right one."""
    return [target_of(prompt, replace(row, output=choice, letters=letter)) for letter, choice in zip(LETTERS, row.choices)]
