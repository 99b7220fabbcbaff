"""Inside a trial: how soon the next run steps (`next-run`), and how much a checkpoint holds beside its adapter (`checkpoint-bytes`)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.training.records import read_steps
from tests.bench.measuring import Row, Taken, machine, row_of
from tests.bench.sweeps import ALONE, ROOT, sweep
from tests.bench.workload import RANKS, Workload

RUNS = 6
"""Of one trial, one after another."""


def next_run(workload: Workload, pairs: int) -> list[Row]:
    """Ours: from the end of a run to the beginning of the next one's first step. Theirs: the same with a new worker group of Ray Train."""
    with tempfile.TemporaryDirectory(dir=workload.folder) as place:
        folder = Path(place)
        grid = {"model": [_model(workload)], "method": ["lora"], "rank": [8], "seed": list(range(RUNS)), "max_steps": [4]}
        sweep(workload, folder, ALONE, grid=grid, pack=1)
        found = _gaps(Storage(folder / "results"))
    theirs = _new_groups(workload, max(2, min(pairs, 5)))
    told = f"{len(found)} gaps in a trial of {RUNS} runs, {len(theirs)} new groups on a Ray that is up"
    notes = ["the new group loads torch, model and adapter again, and starts HF Trainer; ours builds adapter and engine anew"]
    return [row_of("next-run", "new-group", found, theirs, told, notes=notes)]


def _model(workload: Workload) -> dict[str, Any]:
    return {"name": "bench", "family": "llama", "source": {"kind": "path", "path": str(workload.model)}}


def _gaps(storage: Storage) -> list[Taken]:
    """From the end of each run to when the first step of the next began."""
    runs = []
    for path in sorted((storage.root / "runs").iterdir()):
        folder = storage.run(path.name)
        steps = read_steps(folder)
        if steps:
            ended = json.loads(folder.run_json.read_text(encoding="utf-8"))["finished"]
            runs.append((steps[0]["time"] - steps[0]["seconds"], ended))
    runs.sort()
    return [Taken(begun - ended, None) for (_, ended), (begun, _) in pairwise(runs)]


def _first_step(config: dict[str, Any]) -> None:
    """What a worker of a plain sweep does up to its first step; writes down when that began."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from tests.bench.warm import encoded

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.time()
            control.should_training_stop = True

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    base = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANKS[0], target_modules="all-linear", task_type="CAUSAL_LM"))
    stop = Stop()
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place, per_device_train_batch_size=8, max_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        rows = [encoded(tokenizer, row) for row in config["rows"]]
        Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[stop]
        ).train()
    Path(config["told"]).write_text(str(stop.began))


def _new_groups(workload: Workload, count: int) -> list[Taken]:
    """From `fit()` to the first step, each time with a new group; a first one is not counted."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    found = []
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    try:
        for number in range(1 + count):
            told = workload.folder / f"began-{number}"
            trainer = TorchTrainer(
                _first_step,
                train_loop_config={"model": str(workload.model), "rows": workload.rows("train"), "told": str(told)},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(name=f"group-{number}", storage_path=str(workload.folder / "ray")),
            )
            started = time.time()
            trainer.fit()
            found.append(Taken(float(told.read_text()) - started, None))
    finally:
        ray.shutdown()
    return found[1:]


def checkpoint_bytes(workload: Workload) -> list[Row]:
    """All bytes of a checkpoint's folder against those of its weights, of the narrowest and the widest adapter; the worst counts."""
    with tempfile.TemporaryDirectory(dir=workload.folder) as place:
        folder = Path(place)
        grid = {"model": [_model(workload)], "method": ["lora"], "rank": [min(RANKS), max(RANKS)], "max_steps": [1]}
        sweep(workload, folder, ALONE, grid=grid)
        found = []
        for path in sorted((folder / "results/runs").glob("*/checkpoints/step-*")):
            whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append((whole, (path / ADAPTER_WEIGHTS).stat().st_size))
    ratios = [whole / adapter for whole, adapter in found]
    notes = ["lower is better; the rest is PEFT's configuration and checksums"]
    told = f"{len(found)} checkpoints, the worst of them counts"
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    sizes = [float(whole) for whole, _ in found], [float(adapter) for _, adapter in found]
    return [Row("checkpoint-bytes", "adapter", max(ratios), spread, told, machine(), *sizes, "bytes", notes)]
