"""The settings of one run: everything that a grid may vary, by its leaf name."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from jmedlora.config.parts import Number, Part, Schedule, Whole


def _positive_ratio(value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?r", value) or float(value[:-1]) == 0:
        raise PydanticCustomError("alpha_ratio", "a multiple of the rank such as 2r")
    return value


AlphaRatio = Annotated[str, AfterValidator(_positive_ratio)]


class RunSettings(Part):
    """Settings of one adapter, after presets, `training` and the grid have been put together.

    `model`, `method`, `data`, `prompt` and `deepspeed` are names of presets or of parts defined in the sweep.
    Token counts are per row, `batch_size` is rows per optimizer step over all workers, `learning_rate` is the peak.
    """

    model: str
    method: str
    data: str
    prompt: str
    deepspeed: str = "zero0"
    rank: Annotated[Whole, Field(ge=1)] = 8
    alpha: Annotated[Number, Field(gt=0)] | AlphaRatio = 32.0
    """A number, or `2r` for twice the rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "attention"
    """`attention`: query, key and value; `all-linear`: every linear layer but the output projection; or module names."""
    epochs: Annotated[Number, Field(gt=0)] | None = None
    max_steps: Annotated[Whole, Field(ge=1)] | None = None
    batch_size: Annotated[Whole, Field(ge=1)] = 8
    micro_batch_size: Annotated[Whole, Field(ge=1)] | None = None
    """Rows that one worker takes through the model at once; left out: all of its share. Not part of the run's identity."""
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    schedule: Schedule = "constant"
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Left empty (null): gradients are not clipped."""
    max_input_tokens: Annotated[Whole, Field(ge=8)] = 512
    max_target_tokens: Annotated[Whole, Field(ge=1)] = 512
    length_grouping: bool = False
    """Mini-batches of rows of similar length; changes the data order, hence the adapter."""
    gradient_checkpointing: bool = False
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _one_duration(self) -> RunSettings:
        if (self.epochs is None) == (self.max_steps is None):
            given = f"epochs={self.epochs:g} and max_steps={self.max_steps}" if self.epochs is not None else "neither"
            raise ValueError(f"{given} given; allowed: exactly one of epochs and max_steps")
        return self

    @property
    def alpha_value(self) -> float:
        """Alpha as a number."""
        return float(self.alpha[:-1]) * self.rank if isinstance(self.alpha, str) else float(self.alpha)
