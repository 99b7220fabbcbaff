"""Prompt templates: rendering and identity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.digest import digest
from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.rows import LETTERS, Instruction, is_unicode

MAX_TEXT = 1_000_000
"""Characters of a text that a template may make by multiplication."""
MAX_BITS = 1024
"""Size of a whole number that a template may compute."""


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that also refuses arithmetic which would take the machine's memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _is_too_large(operator, left, right):
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    """Whether a product or power would be too large to be made."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times > MAX_TEXT
    if not (isinstance(left, int) and isinstance(right, int)):
        return False
    bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    return bits > MAX_BITS


_ENVIRONMENT = _Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


@lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


def answer_of(prompt: PromptConfig, row: Instruction) -> str:
    """The row's answer in the form that the prompt asks for: its text, or the letters of the right choices."""
    return row.letters if prompt.answer == "letters" and row.letters else row.output


def target_of(prompt: PromptConfig, row: Instruction) -> str:
    """What follows the prompt where it is answered rightly: what a run is trained on, and what likelihoods are asked of."""
    return prompt.answer_prefix + (prompt.answer_marker or "") + answer_of(prompt, row)


def render_prompt(prompt: PromptConfig, row: Instruction, examples: Sequence[Instruction] = ()) -> str:
    """The text put before the model; the answer follows it directly. Of a chat prompt: the user's message.

    `examples` are solved rows for few-shot prompts, shown in their order before the asked one.
    Raises BadInput for whatever goes wrong in the template: it cannot be read, names a variable that does not exist, computes nonsense.
    """
    try:
        text = _compiled(prompt.template).render(
            **_asked(row),
            examples=[{**_asked(example), "output": example.output, "answer": answer_of(prompt, example)} for example in examples],
        )
    except Exception as error:  # a template is the user's program: every error in it is the user's to mend
        raise _bad_template(prompt, str(error) or type(error).__name__) from None
    if not is_unicode(text):
        raise _bad_template(prompt, "makes a text that is not valid Unicode")
    return text


def render_messages(prompt: PromptConfig, row: Instruction, examples: Sequence[Instruction] = ()) -> list[dict[str, str]]:
    """The prompt as messages with `role` and `content`: of a chat prompt, each example is a turn of its own; else one user message."""
    if not prompt.chat:
        return [{"role": "user", "content": render_prompt(prompt, row, examples)}]
    turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for example in examples:
        turns.append({"role": "user", "content": render_prompt(prompt, example).rstrip()})
        turns.append({"role": "assistant", "content": target_of(prompt, example).strip()})
    return [*turns, {"role": "user", "content": render_prompt(prompt, row).rstrip()}]


@lru_cache(maxsize=64)
def prompt_digest(prompt: PromptConfig) -> str:
    """Identity of a prompt: all that changes what is asked or how the answer is read, not its name or note."""
    told = prompt.model_dump(mode="json", exclude={"name", "note"}, exclude_defaults=True)
    return digest({"template": prompt.template, **told})


def _asked(row: Instruction) -> dict[str, Any]:
    """What a template may know of the row that is asked: not its answer."""
    return {
        "instruction": row.instruction,
        "input": row.input,
        "choices": list(row.choices),
        "letters": list(LETTERS[: len(row.choices)]),
        "count": row.count,
    }


def _bad_template(prompt: PromptConfig, problem: str) -> BadInput:
    return BadInput(
        [
            Fault(
                f"prompt {prompt.name}",
                "template",
                problem,
                "a Jinja2 template of instruction, input, choices, letters, count and examples",
            )
        ]
    )
