"""Scoring checkpoints on benchmarks with one resident base model."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, load_peft_weights, set_peft_model_state_dict

from jmedlora import __version__
from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.parts import ModelConfig, Precision
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import target_of
from jmedlora.data.rows import LETTERS, Instruction, Question
from jmedlora.data.tokenisation import encode_choice, prompt_text
from jmedlora.evaluation.generation import EncodedPrompts, decode_greedily, encode_prompts, max_prompt_tokens
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.likelihood import weigh_choices
from jmedlora.evaluation.results import Answers, asked_rows, write_results
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.checksums import adapter_digest, verify
from jmedlora.plan.identity import model_identity
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class AdapterHasNoEffect(Exception):
    """The adapter does not change the base model's logits: scoring it would score the base under another name."""


class AdapterDoesNotFit(Exception):
    """The adapter's weights and the layers that its config asks for are not the same."""


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

    Adapters come and go beside the base's weights, which are neither merged nor reloaded; the last one stays, since
    several evaluations of one checkpoint usually follow each other.
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
        self._adapted: PeftModel | None = None
        self._adapter_digest: str | None = None
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

        Writes predictions.jsonl, then metrics.json, into the evaluation's folder, and returns the metrics. Answers are generated
        or choices weighed, as the evaluation says. `on_progress(done, total)` is called with numbers of questions. Goes on from the
        answers that a start which was killed has left.
        Raises AdapterDamaged when the checkpoint is not what its checksums say, AdapterDoesNotFit, AdapterHasNoEffect, and
        BadInput when the benchmark does not fit the evaluation.
        """
        started = time.perf_counter()
        task = self._task(evaluation)
        if step:
            self._load_adapter(storage.run(run_key).checkpoint(step), task.prompts.token_ids[0])
        else:
            self._unload_adapter()
        total = len(task.questions)
        on_batch = (lambda done: on_progress(done, total)) if on_progress else None
        identity = {"adapter": self._adapter_digest, "asked": task.digest, **self._base_facts}
        with Journal(storage, run_key, step, evaluation, identity, started) as journal:
            answers, new_tokens = self._answers(task, evaluation, journal, on_batch)
            facts = {
                "adapter_digest": self._adapter_digest,
                "prompt_tokens": task.prompts.tokens,
                "new_tokens": new_tokens,
                "truncated_prompts": task.prompts.truncated,
                "batch_size": journal.batch_size,
                "seconds": journal.earlier_s + time.perf_counter() - started,
                "device": self._device_name(),
            }
            return write_results(storage, run_key, step, evaluation, task.questions, answers, facts)

    def _answers(
        self, task: _Task, evaluation: EvaluationSpec, journal: Journal, on_batch: Callable[[int], None] | None
    ) -> tuple[Answers, int]:
        """The answers, and the tokens that were generated or weighed."""
        if evaluation.scoring == "loglikelihood":
            likelihoods = weigh_choices(self._base, task.prompts, task.choices, evaluation.batch_size, self.device, on_batch, journal)
            return Answers([], likelihoods), sum(sum(each.tokens) for each in likelihoods)
        generation = decode_greedily(
            self._base,
            self._tokenizer,
            task.prompts,
            evaluation.max_new_tokens,
            evaluation.batch_size,
            self.device,
            on_batch,
            evaluation.prompt.answer_marker,
            journal,
        )
        return Answers(generation.texts, []), generation.new_tokens

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

    def _load_adapter(self, folder: Path, prompt: list[int]) -> None:
        """Put the adapter into the base unless it is there, once it is proven whole and to change the logits of `prompt`."""
        verify(folder)
        digest = adapter_digest(folder)
        if digest == self._adapter_digest:
            return
        self._unload_adapter()
        before = self._logits(prompt)
        try:
            self._attach(folder)
            if torch.equal(before, self._logits(prompt)):
                raise AdapterHasNoEffect(f"{folder}: the adapter does not change the base model's logits")
        except BaseException:
            # Whatever went wrong, the next checkpoint must find the base as it was.
            self._unload_adapter()
            raise
        self._adapter_digest = digest

    def _attach(self, folder: Path) -> None:
        """Wrap the base's layers and fill them from the file; unlike PeftModel.from_pretrained, raise for weights without a match."""
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers among themselves
                # Created empty: no random numbers are drawn for what is overwritten.
                self._adapted = PeftModelForCausalLM(self._base, config, low_cpu_mem_usage=True).eval()
            weights = load_peft_weights(folder, device=str(self.device))
            loaded = set_peft_model_state_dict(self._adapted, weights, low_cpu_mem_usage=True)
        except torch.OutOfMemoryError:  # which is a RuntimeError too
            raise
        except (RuntimeError, ValueError) as error:  # other shapes, or layers that the base does not have
            raise AdapterDoesNotFit(f"{folder}: {' '.join(str(error).split())}") from None
        unmatched = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if ".lora_" in key)]
        if unmatched:
            raise AdapterDoesNotFit(f"{folder}: {len(unmatched)} weights without a match in the base model, {unmatched[0]} among them")

    def _unload_adapter(self) -> None:
        """Take the adapter's layers out again: what is left is the base as it was loaded."""
        if self._adapted is not None:
            self._adapted.unload()
        self._adapted = self._adapter_digest = None

    @torch.inference_mode()
    def _logits(self, prompt: list[int]) -> torch.Tensor:
        return self._base(input_ids=torch.tensor([prompt], device=self.device), use_cache=False).logits

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def _choice_targets(prompt: PromptConfig, row: Instruction) -> list[str]:
    """What would follow the prompt for each choice, were it the right one."""
    return [target_of(prompt, replace(row, output=choice, letters=letter)) for letter, choice in zip(LETTERS, row.choices)]
