"""Runs of a workload by our loop and by HF Trainer with PEFT, from the same adapters over the same rows: what comes out of both."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.evaluation.results import Checkpoint
from jmedlora.plan.layout import ADAPTER_WEIGHTS, PREDICTIONS, Storage
from jmedlora.plan.planner import open_sweep
from jmedlora.plan.specs import RunSpec
from jmedlora.training.batches import MiniBatches
from jmedlora.training.loop import train_trial
from jmedlora.training.process import ensure_process_group
from tests.bench.warm import answers, encoded, train
from tests.bench.workload import Workload, write_sweep
from tests.integration.training_worker import Silent
from tests.plain_lora import PlainLora

CHECKED = ((4, 1), (16, 3))
"""Ranks and epochs of the runs that are compared."""


def same_start(workload: Workload, checked: Sequence[tuple[int, int]] = CHECKED) -> str:
    """How far the adapters of some runs are apart, and how many answers are the same; Trainer takes our rows in our order."""
    ensure_process_group()
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    base = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    apart = []
    same = total = 0
    for spec, adapter, own in _ours(workload, checked):
        theirs, texts = _plain(workload, spec, base, tokenizer)
        assert adapter.keys() == theirs.keys()
        apart.append(torch.cat([(adapter[name] - theirs[name]).abs().flatten() for name in adapter]))
        same += sum(a == b for a, b in zip(own, texts, strict=True))
        total += len(own)
    far = torch.cat(apart)
    beyond = f" ({int((far > 1e-4).sum())} of {len(far)} above 1e-4)" if float(far.max()) > 1e-4 else ""
    runs = ", ".join(f"({rank}, {epochs})" for rank, epochs in checked)
    return f"same start and rows, runs {runs}: weights at most {float(far.max()):.0e} apart{beyond}, {same} of {total} answers are the same"


def _ours(workload: Workload, checked: Sequence[tuple[int, int]]) -> list[tuple[RunSpec, dict[str, Tensor], list[str]]]:
    """Of each run: its plan, its adapter, its answers."""
    with tempfile.TemporaryDirectory(dir=workload.folder) as place:
        folder = Path(place)
        config, plan = open_sweep(str(write_sweep(workload, folder)), [f"storage={folder / 'results'}"])
        storage, sources = Storage(config.storage_path), Path(config.sources)
        for trial in plan.trials:
            runs = [run for run in trial.runs if (run.settings.rank, run.settings.epochs) in checked]
            if runs:
                train_trial(trial.model_copy(update={"runs": runs}), storage, sources, True, Silent())
        runs = [run for run in plan.runs if (run.settings.rank, run.settings.epochs) in checked]
        [base], [evaluation] = plan.bases, plan.evaluations
        evaluator = Evaluator(base.model, base.precision, base.compute_precision, True, sources, True)
        evaluator.evaluate_together([Checkpoint(run.run_key, run.total_steps) for run in runs], evaluation, storage, len(runs))
        found = []
        for run in runs:
            kept = storage.run(run.run_key)
            lines = (kept.evaluation(evaluation.folder, run.total_steps) / PREDICTIONS).read_text(encoding="utf-8").splitlines()
            adapter = load_file(kept.checkpoint(run.total_steps) / ADAPTER_WEIGHTS)
            found.append((run, adapter, [json.loads(line)["response"] for line in lines]))
        return found


def _plain(workload: Workload, spec: RunSpec, base: Any, tokenizer: Any) -> tuple[dict[str, Tensor], list[str]]:
    """One epoch of HF Trainer, over all rows that the run takes, one after another."""
    rows = [encoded(tokenizer, row) for row in workload.rows("train")]
    batches = MiniBatches([len(row["input_ids"]) for row in rows], spec.settings.batch_size, spec.settings.seed, False)
    ordered = [rows[place] for step in range(1, spec.total_steps + 1) for place in batches.rows_of(step)]
    plain = PlainLora(base, spec.settings, "llama")
    train(plain.model, tokenizer, ordered, 1, "sequential", workload.folder)
    weights = {name: weight.detach().clone() for name, weight in plain.weights().items()}
    texts = answers(plain.model.eval(), tokenizer, workload.rows("questions"))
    plain.model.unload()
    return weights, texts
