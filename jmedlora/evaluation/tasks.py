"""What a benchmark asks, read and encoded for one model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config.benchmark import PromptConfig
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import target_of
from jmedlora.data.rows import LETTERS, Instruction, Question
from jmedlora.data.tokenisation import encode_choice, prompt_text
from jmedlora.evaluation.generation import EncodedPrompts, encode_prompts, max_prompt_tokens
from jmedlora.evaluation.results import asked_rows
from jmedlora.plan.specs import EvaluationSpec


@dataclass(frozen=True)
class Task:
    """What a benchmark asks, ready for the model."""

    questions: list[Question]
    prompts: EncodedPrompts
    choices: list[list[list[int]]]
    """Token ids of each question's choices; empty where answers are generated."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all that the model is given."""
        return hashlib.sha256(json.dumps([self.prompts.token_ids, self.choices]).encode()).hexdigest()


def make_task(
    evaluation: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, sources: Path, spare_tokens: int = 0
) -> Task:
    """Reads the benchmark and encodes its prompts, and where choices are weighed these.

    `model` tells the number of positions; `spare_tokens` of them stay empty behind a choice. Raises BadInput when the benchmark
    does not fit the evaluation, or its answers leave no room for a prompt.
    """
    questions, examples = asked_rows(evaluation, load_benchmark(evaluation.benchmark, sources))
    rows = [question.as_instruction() for question in questions]
    texts = [prompt_text(tokenizer, evaluation.prompt, row, examples) for row in rows]
    choices = []
    room = evaluation.max_new_tokens
    if evaluation.scoring == "loglikelihood":
        choices = [[encode_choice(tokenizer, text) for text in _choice_targets(evaluation.prompt, row)] for row in rows]
        room = max(len(ids) for own in choices for ids in own) + spare_tokens
    prompts = encode_prompts(tokenizer, texts, max_prompt_tokens(model, room), evaluation.prompt.chat)
    return Task(questions, prompts, choices)


def _choice_targets(prompt: PromptConfig, row: Instruction) -> list[str]:
    """What would follow the prompt for each choice, were it the right one."""
    return [target_of(prompt, replace(row, output=choice, letters=letter)) for letter, choice in zip(LETTERS, row.choices)]
