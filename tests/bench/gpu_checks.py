"""What a GPU must give: the CPU's losses, scores and answers, and a resumed run that ends as an undisturbed one.

Each check returns figures; `tests.bench.gpu` prints them, and `tests/integration/test_gpu.py` holds them against bounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from jmedlora.evaluation.generation import decode_greedily, encode_prompts
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.likelihood import weigh_choices
from jmedlora.evaluation.resident import Resident
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.plan.records import read_training
from jmedlora.plan.specs import RunSpec
from jmedlora.training.loop import train_trial
from jmedlora.training.process import ensure_process_group
from tests.tiny import run_spec, tiny_model, trial_of, write_rows

FAMILIES = ("llama", "gpt_neox")
PRECISIONS = (("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16"))
PROMPTS = [f"{'問題文。' * (1 + place % 7)}第{place}問の答えは" for place in range(24)]
CHOICES = ["糖尿病", "高血圧", "肺炎"]
TRAINING = {"targets": "all-linear", "schedule": "cosine", "max_steps": 8, "micro_batch_size": 2}


class _Silent:
    """A listener that may end the run after a step."""

    def __init__(self, kill_at: int | None = None):
        self._kill_at = kill_at

    def on_run_start(self, run_key: str, total_steps: int) -> None: ...

    def on_step(self, run_key: str, record: dict[str, Any]) -> None:
        if record["step"] == self._kill_at:
            raise KeyboardInterrupt

    def on_checkpoint(self, run_key: str, step: int) -> None: ...

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None: ...


def specs_of(folder: Path) -> dict[str, RunSpec]:
    """A run per family and precision, and one per ZeRO stage."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not rows.is_file():
        write_rows(folder)
    found = {}
    for family in FAMILIES:
        for precision, compute in PRECISIONS:
            name = f"{family} {precision}" + ("" if precision == compute else f" in {compute}")
            found[name] = run_spec(rows, family, precision, compute, checkpoint_every=3, **TRAINING)  # type: ignore[arg-type]
        for stage in (1, 2, 3):
            found[f"{family} fp32 zero{stage}"] = run_spec(rows, family, zero_stage=stage, checkpoint_every=3, **TRAINING)  # type: ignore[arg-type]
    found["llama fp32 checkpointing"] = run_spec(rows, checkpoint_every=3, gradient_checkpointing=True, **TRAINING)
    return found


def train(folder: Path, spec: RunSpec, kill_at: int | None = None) -> None:
    """Trains one run on the device that there is; a run killed after a step may be gone on with."""
    ensure_process_group()
    try:
        outcomes = train_trial(trial_of(spec), Storage(folder), folder, True, _Silent(kill_at))
    except KeyboardInterrupt:
        return
    assert all(outcome.status == "finished" for outcome in outcomes), outcomes


def losses(folder: Path, spec: RunSpec) -> list[float]:
    return [line["loss"] for line in read_training(Storage(folder), spec.run_key)]


def score_all(family: str, device: str) -> dict[str, Any]:
    """Answers, batched and one by one, and log-likelihoods of a tiny model in fp32."""
    folder = materialise(tiny_model(family), Path("unused"), True)  # type: ignore[arg-type]
    tokenizer, model = load_tokenizer(folder), load_base(folder, "fp32", "fp32", True, device)
    prompts = encode_prompts(tokenizer, PROMPTS, 200)
    batched = decode_greedily(model, tokenizer, prompts, 24, 8, device).texts
    singly = [decode_greedily(model, tokenizer, encode_prompts(tokenizer, [one], 200), 24, 1, device).texts[0] for one in PROMPTS]
    choices = [[tokenizer(choice, add_special_tokens=False).input_ids for choice in CHOICES] for _ in PROMPTS]
    weighed = weigh_choices(Resident(model, device), prompts, choices, 9, [AnswersSoFar(9)])[0]
    return {"batched": batched, "singly": singly, "likelihoods": [list(each.sums) for each in weighed]}


def on_the_cpu(folder: Path) -> dict[str, Any]:
    """The same trainings and scores by a process that sees no GPU: losses by run, scores by family."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench.gpu_checks", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode:
        raise RuntimeError(f"the CPU's part failed: {done.stderr[-600:]}")
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8"))


def compare_training(folder: Path, name: str, spec: RunSpec, expected: list[float]) -> dict[str, Any]:
    """Largest relative difference of a step's loss between this device and the CPU, over all steps and at the first."""
    train(folder / "here", spec)
    found = losses(folder / "here", spec)
    differences = [abs(here - there) / abs(there) for here, there in zip(found, expected, strict=True)]
    return {"run": name, "steps": len(found), "first": differences[0], "largest": max(differences), "loss": [found[0], found[-1]]}


def compare_resumed(folder: Path, name: str, spec: RunSpec) -> dict[str, Any]:
    """Trains once whole and once killed after step 5 (gone on from step 3): largest difference of the last adapters' weights."""
    train(folder / "whole", spec)
    train(folder / "killed", spec, kill_at=5)
    train(folder / "killed", spec)
    whole, killed = (
        load_file(Storage(folder / part).run(spec.run_key).checkpoint(spec.total_steps) / ADAPTER_WEIGHTS) for part in ("whole", "killed")
    )
    apart = max(float((whole[key].float() - killed[key].float()).abs().max()) for key in whole)
    return {"run": name, "bit_for_bit": all(torch.equal(whole[key], killed[key]) for key in whole), "largest_difference": apart}


def compare_scores(family: str, expected: dict[str, Any], device: str) -> dict[str, Any]:
    """Answers in batches against one by one, both against the CPU's, and log-likelihoods against the CPU's (nats)."""
    found = score_all(family, device)
    pairs = zip(found["likelihoods"], expected["likelihoods"], strict=True)
    apart = max(abs(here - there) for mine, theirs in pairs for here, there in zip(mine, theirs, strict=True))
    return {
        "family": family,
        "answers": len(PROMPTS),
        "batched_as_singly": sum(a == b for a, b in zip(found["batched"], found["singly"], strict=True)),
        "as_on_the_cpu": sum(a == b for a, b in zip(found["batched"], expected["batched"], strict=True)),
        "likelihoods_apart": apart,
    }


def _cpu_part(folder: Path) -> None:
    specs = specs_of(folder)
    found: dict[str, Any] = {"losses": {}, "scores": {}}
    for name, spec in specs.items():
        train(folder / "cpu", spec)
        found["losses"][name] = losses(folder / "cpu", spec)
    for family in FAMILIES:
        found["scores"][family] = score_all(family, "cpu")
    (folder / "cpu.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _cpu_part(Path(sys.argv[1]))
