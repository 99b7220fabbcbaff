"""What is measured: a run's shape and settings, as a plan would describe it; those of the study's models, and tiny ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jmedlora.config.data import DataConfig
from jmedlora.config.parts import Architecture, DeepSpeedConfig, Family, MethodConfig, ModelConfig, Precision, RandomSource
from jmedlora.config.run import RunSettings
from jmedlora.plan.shapes import model_parameters
from jmedlora.plan.specs import RunSpec
from tests.tiny import PROMPT

Compute = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how; `accumulated` micro-batches of `rows` rows of each adapter make a step.

    Adapters of a pack have rows of their own, as those of a grid over seeds: they cannot share dropout masks.
    """

    name: str
    family: Family
    shape: Architecture
    precision: Precision = "fp32"
    compute: Compute = "fp32"
    rank: int = 8
    targets: str = "attention"
    dropout: float = 0.0
    checkpointing: bool = False
    rows: int = 2
    input_tokens: int = 64
    target_tokens: int = 64
    stage: int = 0
    accumulated: int = 2
    adapters: int = 1

    def __str__(self) -> str:
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        drop = f" dropout {self.dropout}" if self.dropout else ""
        low = "" if self.precision == self.compute else f" in {self.compute}"
        packed = f" {self.adapters} adapters" if self.adapters > 1 else ""
        return f"{self.name} {self.precision}{low} r{self.rank} {self.targets}{drop} {kept} {self.rows} rows zero{self.stage}{packed}"

    def changed(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def spec(self) -> RunSpec:
        """The run of one adapter as the plan would describe it."""
        method = "qlora" if self.precision == "nf4" else "lora"
        settings = RunSettings(
            model=self.name,
            method=method,
            data="random",
            prompt=PROMPT.name,
            deepspeed=f"zero{self.stage}",
            rank=self.rank,
            targets=self.targets,  # type: ignore[arg-type]
            dropout=self.dropout,
            max_steps=10,
            batch_size=self.rows * self.accumulated,
            micro_batch_size=self.rows,
            max_input_tokens=self.input_tokens,
            max_target_tokens=self.target_tokens,
            gradient_checkpointing=self.checkpointing,
        )
        model = ModelConfig(name=self.name, source=RandomSource(kind="random"), family=self.family, architecture=self.shape)
        return RunSpec.model_validate(
            {
                "run_key": "0" * 12,
                "trajectory_key": "0" * 12,
                "settings": settings,
                "model": model,
                "method": MethodConfig(name=method, quantisation="nf4" if self.precision == "nf4" else "none"),
                "precision": self.precision,
                "compute_precision": self.compute,
                "data": DataConfig(name="random", path="unused"),
                "data_digest": "",
                "rows": 1000,
                "row_characters": float(self.input_tokens + self.target_tokens),
                "prompt": PROMPT,
                "deepspeed": DeepSpeedConfig.model_validate({"zero_stage": self.stage}),
                "steps_per_epoch": 10,
                "total_steps": 10,
                "checkpoint_steps": [10],
                "base_key": "0" * 12,
                "model_parameters": model_parameters(self.family, self.shape),
            }
        )


CALM_7B = Architecture(layers=32, hidden_size=4096, intermediate_size=16384, heads=32, kv_heads=32, vocabulary=52224)
LLAMA_7B = Architecture(layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, vocabulary=32000, max_positions=4096)
LLAMA_13B = Architecture(layers=40, hidden_size=5120, intermediate_size=13824, heads=40, kv_heads=40, vocabulary=32000, max_positions=4096)
LLAMA_70B = Architecture(layers=80, hidden_size=8192, intermediate_size=28672, heads=64, kv_heads=8, vocabulary=32000, max_positions=4096)
TINY_LLAMA = Architecture(layers=3, hidden_size=128, intermediate_size=344, heads=4, kv_heads=2, vocabulary=512, max_positions=2048)
TINY_NEOX = Architecture(layers=3, hidden_size=128, intermediate_size=512, heads=4, kv_heads=4, vocabulary=512)


def base_cases(tiny: bool) -> dict[str, Case]:
    """One case per model: the study's settings, 512 tokens of prompt and 512 of answer."""
    calm, small, middle, large = (TINY_NEOX, TINY_LLAMA, TINY_LLAMA, TINY_LLAMA) if tiny else (CALM_7B, LLAMA_7B, LLAMA_13B, LLAMA_70B)
    length = {"input_tokens": 32, "target_tokens": 32} if tiny else {"input_tokens": 512, "target_tokens": 512}
    lora = {"precision": "bf16", "compute": "bf16", "rank": 8, "dropout": 0.05, "accumulated": 2, **length}
    qlora = {**lora, "precision": "nf4", "rank": 64, "targets": "all-linear", "dropout": 0.1, "checkpointing": True}
    return {
        "calm-7b": Case("open-calm-7b", "gpt_neox", calm, **lora),  # type: ignore[arg-type]
        "llama-7b": Case("llama2-7b", "llama", small, **lora),  # type: ignore[arg-type]
        "llama-13b": Case("llama2-13b", "llama", middle, **qlora),  # type: ignore[arg-type]
        "llama-70b": Case("llama2-70b", "llama", large, **qlora),  # type: ignore[arg-type]
    }


def memory_cases(tiny: bool) -> list[Case]:
    """What is measured: those of one base model and precision follow each other, so that it is made once."""
    bases = base_cases(tiny)
    calm, llama, middle, large = (bases[name] for name in ("calm-7b", "llama-7b", "llama-13b", "llama-70b"))
    found = [calm.changed(rank=rank, rows=2) for rank in (8, 64, 128)]
    found += [calm.changed(rows=rows) for rows in (1, 4)]
    found += [calm.changed(rows=rows, checkpointing=True) for rows in (1, 4, 8)]
    found += [calm.changed(rows=2, targets="all-linear", rank=64, dropout=0.0), calm.changed(rows=2, stage=2, rank=64)]
    found += [llama.changed(rows=rows, rank=64) for rows in (1, 4)]
    found += [llama.changed(rows=rows, rank=64, checkpointing=True) for rows in (1, 8)]
    found += [llama.changed(rows=2, rank=256, targets="all-linear", checkpointing=True), llama.changed(rows=2, stage=3, checkpointing=True)]
    found += [middle.changed(rows=rows) for rows in (1, 4, 8)]
    found += [middle.changed(rows=1, checkpointing=False), middle.changed(rows=1, rank=128)]
    found += [large.changed(rows=1, rank=rank) for rank in (64, 128)] + [large.changed(rows=rows) for rows in (2, 4)]
    found += [calm.changed(rows=1, rank=64, adapters=count, checkpointing=True) for count in (2, 8)]
    return found


def timing_cases(tiny: bool) -> list[Case]:
    """What is timed, ours against a plain loop."""
    bases = base_cases(tiny)
    return [
        bases["calm-7b"].changed(rows=8, rank=64, checkpointing=True, accumulated=1),
        bases["calm-7b"].changed(rows=2, rank=64, accumulated=4),
        bases["calm-7b"].changed(rows=2, rank=64, checkpointing=True, accumulated=1, adapters=4),
        bases["llama-7b"].changed(rows=8, rank=64, checkpointing=True, accumulated=1),
        bases["llama-13b"].changed(rows=4, accumulated=1),
        bases["llama-70b"].changed(rows=2, accumulated=1),
    ]


LLAMA_0_5B = Architecture(layers=24, hidden_size=1024, intermediate_size=4096, heads=16, kv_heads=16, vocabulary=32000, max_positions=4096)
LLAMA_1_5B = Architecture(layers=28, hidden_size=1536, intermediate_size=8960, heads=12, kv_heads=12, vocabulary=32000, max_positions=4096)


def pack_cases(tiny: bool) -> dict[str, list[Case]]:
    """Packs of 1, 4 and 8 adapters over one base, by base; steps of few tokens, where packing ought to pay, and of many."""
    shapes = {"0.5b": LLAMA_0_5B, "1.5b": LLAMA_1_5B, "7b": LLAMA_7B}
    lora = {"precision": "bf16", "compute": "bf16", "targets": "all-linear", "rank": 16, "dropout": 0.05, "accumulated": 1}
    found = {}
    for name, shape in {"tiny": TINY_LLAMA}.items() if tiny else shapes.items():
        for precision in ("bf16", "nf4") if name in ("tiny", "7b") else ("bf16",):
            base = Case(name, "llama", shape, **{**lora, "precision": precision, "checkpointing": name == "7b"})  # type: ignore[arg-type]
            found[f"{name} {precision}"] = [
                base.changed(rows=rows, input_tokens=tokens, target_tokens=64, adapters=adapters)
                for rows, tokens in ((1, 64), (4, 64), (4, 448))
                for adapters in (1, 4, 8)
            ]
    return found


_LLAMA = Architecture(layers=6, hidden_size=320, intermediate_size=880, heads=8, kv_heads=4, vocabulary=2048, max_positions=1024)
_NEOX = Architecture(layers=6, hidden_size=320, intermediate_size=1280, heads=8, kv_heads=8, vocabulary=2048, max_positions=1024)


def _cpu_cases() -> list[Case]:
    """Small enough for seconds each, large enough that what they hold outweighs what surrounds it."""
    found = []
    for case in (Case("llama", "llama", _LLAMA, rows=4), Case("gpt_neox", "gpt_neox", _NEOX, rows=4)):
        bf16 = case.changed(precision="bf16", compute="bf16")
        nf4 = case.changed(precision="nf4", compute="bf16", targets="all-linear", rank=32)
        wide = case.changed(rank=256, targets="all-linear", rows=1, input_tokens=8, target_tokens=8)
        found += [case, bf16, bf16.changed(checkpointing=True), case.changed(rows=1, target_tokens=192, targets="all-linear", dropout=0.1)]
        found += [nf4, nf4.changed(checkpointing=True, dropout=0.1), case.changed(stage=2), bf16.changed(stage=3, checkpointing=True)]
        found += [wide, wide.changed(precision="bf16", compute="bf16"), wide.changed(stage=2), case.changed(stage=3)]
    return found


def _packs() -> list[Case]:
    case = Case("llama", "llama", _LLAMA, rows=1, adapters=4)
    nf4 = case.changed(precision="nf4", compute="bf16", targets="all-linear", rank=32, adapters=3, dropout=0.1)
    return [case.changed(rows=2, rank=32, targets="all-linear", dropout=0.1), nf4, case.changed(stage=2), nf4.changed(checkpointing=True)]


_SINGLE_CASES = _cpu_cases()
CPU_CASES = [*_SINGLE_CASES, *_packs()]
QUICK_CASES = [*(_SINGLE_CASES[place] for place in (1, 3, 5, 7, 9, 11, 12, 17, 18)), *_packs()]
"""Every kind of precision and stage."""
