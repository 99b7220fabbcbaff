"""Prompt templates: rendering and identity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jmedlora.config.digest import digest
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import PromptConfig
from jmedlora.data.rows import Instruction

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


@lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


def render_prompt(prompt: PromptConfig, row: Instruction, examples: Sequence[Instruction] = ()) -> str:
    """The text put before the model; the answer follows it directly.

    `examples` are solved rows for few-shot prompts, shown in their order before the asked one.
    Raises BadInput when the template cannot be read or names a variable that does not exist.
    """
    try:
        return _compiled(prompt.template).render(
            instruction=row.instruction, input=row.input, examples=[example.as_dict() for example in examples]
        )
    except TemplateError as error:
        raise BadInput(
            [Fault(f"prompt {prompt.name}", "template", str(error), "a Jinja2 template of instruction, input and examples")]
        ) from None


def prompt_digest(prompt: PromptConfig) -> str:
    """Identity of a prompt: its template, not its name."""
    return digest({"template": prompt.template})
