"""Tiny models and runs, built on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.data import DataConfig
from jmedlora.config.digest import digest_rows, key_of
from jmedlora.config.parts import Architecture, DeepSpeedConfig, Family, MethodConfig, ModelConfig, Precision, RandomSource
from jmedlora.config.run import RunSettings
from jmedlora.data.rows import Instruction
from jmedlora.plan.specs import RunSpec, TrialSpec

PROMPT = PromptConfig(name="tiny", template="{{ instruction }}\n{{ input }}\n答え：")
ROWS = [
    Instruction("次の問題に答えよ。", "糖尿病" * (1 + place % 3), "インスリン"[: 1 + place % 5] + "a" * (place * 7 % 11))
    for place in range(13)
]


def tiny_model(family: Family) -> ModelConfig:
    """Random weights: two layers, 32 wide, byte-level tokenizer; 40 wide inside, which is no multiple of 32."""
    return ModelConfig(
        name=f"tiny-{family}",
        source=RandomSource(kind="random", seed=1),
        family=family,
        architecture=Architecture(
            layers=2,
            hidden_size=32,
            intermediate_size=40,
            heads=4,
            kv_heads=2 if family == "llama" else 4,
            vocabulary=272,
            tied_embeddings=family == "llama",
            max_positions=256,
        ),
    )


def write_rows(folder: Path, rows: Sequence[Instruction] = ROWS) -> Path:
    """A training file below `folder`."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def run_spec(
    data_file: Path,
    family: Family = "llama",
    precision: Precision = "fp32",
    compute_precision: str = "fp32",
    zero_stage: int = 0,
    checkpoint_every: int | None = None,
    **settings: Any,
) -> RunSpec:
    """A run of a tiny model on the rows of `data_file`; further arguments are run settings."""
    rows = [json.loads(line) for line in data_file.read_text(encoding="utf-8").splitlines()]
    chosen = {"rank": 4, "dropout": 0.1, "batch_size": 5, "learning_rate": 1e-2, "max_steps": 6, "max_input_tokens": 64, **settings}
    method = "qlora" if precision == "nf4" else "lora"
    run = RunSettings(model=f"tiny-{family}", method=method, data="tiny", prompt=PROMPT.name, deepspeed=f"zero{zero_stage}", **chosen)
    steps_per_epoch = -(-len(rows) // run.batch_size)
    total_steps = run.max_steps or round((run.epochs or 0) * steps_per_epoch)
    facts = {"settings": run.model_dump(mode="json"), "family": family, "precision": [precision, compute_precision], "rows": rows}
    duration = {"epochs", "max_steps"} if run.schedule == "constant" else set()
    trajectory = run.model_dump(mode="json", exclude=duration)
    every = checkpoint_every or total_steps
    return RunSpec.model_validate(
        {
            "run_key": key_of(facts),
            "trajectory_key": key_of(facts | {"settings": trajectory}),
            "settings": run,
            "model": tiny_model(family),
            "method": MethodConfig(name=method, quantisation="nf4" if precision == "nf4" else "none"),
            "precision": precision,
            "compute_precision": compute_precision,
            "data": DataConfig(name="tiny", path=str(data_file)),
            "data_digest": digest_rows(rows),
            "rows": len(rows),
            "row_characters": sum(len(text) for row in rows for text in row.values()) / len(rows),
            "prompt": PROMPT,
            "deepspeed": DeepSpeedConfig.model_validate({"zero_stage": zero_stage}),
            "steps_per_epoch": steps_per_epoch,
            "total_steps": total_steps,
            "checkpoint_steps": [step for step in range(1, total_steps + 1) if step % every == 0 or step == total_steps],
            "base_key": "0" * 12,
            "model_parameters": 1000,
        }
    )


def trial_of(*runs: RunSpec, workers: int = 1, pack: int = 1, share_prefixes: bool = False) -> TrialSpec:
    """A trial of these runs."""
    chosen = {"workers": workers, "pack": pack, "share_prefixes": share_prefixes}
    return TrialSpec(trial_id="tiny", runs=list(runs), cpus_per_worker=1, gpus_per_worker=0, **chosen)
