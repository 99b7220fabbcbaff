"""One warm process per arm: `python -m tests.bench.warm ARM FOLDER` does its work once for every line on stdin, and tells how long it took.

`ours`: this project's training and evaluation cores, in one process without Ray. `plain`: HF Trainer with PEFT, run after run over
a base model that is loaded once, rows of similar length together, and `generate` in batches; what a careful user would write.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jmedlora.evaluation.metrics import first_line
from tests.bench.workload import EPOCHS, LEARNING_RATE, NEW_TOKENS, RANKS, ROUND, Workload, write_sweep

Work = Callable[[], dict[str, Any]]


def ours(workload: Workload) -> Work:
    """The 12 runs by `train_trial` and `Evaluator.evaluate_together`; bases are evaluated too."""
    from jmedlora.evaluation.evaluator import Evaluator
    from jmedlora.evaluation.results import Checkpoint
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.planner import open_sweep
    from jmedlora.training.loop import train_trial
    from jmedlora.training.process import ensure_process_group
    from tests.integration.training_worker import Silent

    ensure_process_group()
    place = Path(tempfile.mkdtemp(dir=workload.folder))
    os.environ["JMEDLORA_CACHE"] = str(place / "cache")
    config, plan = open_sweep(str(write_sweep(workload, place)), [f"storage={place / 'results'}"])
    base = plan.bases[0]
    evaluator = Evaluator(base.model, base.precision, base.compute_precision, True, Path(config.sources), True)

    def work() -> dict[str, Any]:
        shutil.rmtree(config.storage_path, ignore_errors=True)
        storage = Storage(config.storage_path)
        for trial in plan.trials:
            train_trial(trial, storage, Path(config.sources), True, Silent())
        trained = time.perf_counter()
        checkpoints = [Checkpoint(run.run_key, run.total_steps) for run in plan.runs]
        scores: dict[str, float] = {}
        for evaluation in plan.evaluations:
            for run, metrics in zip(plan.runs, evaluator.evaluate_together(checkpoints, evaluation, storage, 12), strict=True):
                assert not isinstance(metrics, Exception), metrics
                scores[f"{run.settings.rank} {run.settings.epochs:g}"] = metrics["gestalt_score"]
        return {"trained_at": trained, "gestalt": scores}

    return work


def plain(workload: Workload) -> Work:
    """The same runs by HF Trainer and `generate`, one after another."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    base = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    rows = [encoded(tokenizer, row) for row in workload.rows("train")]
    questions = workload.rows("questions")

    def work() -> dict[str, Any]:
        scores, trained = {}, 0.0
        for rank in RANKS:
            for epochs in EPOCHS:
                torch.manual_seed(0)
                settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
                model = get_peft_model(base, settings)
                train(model, tokenizer, rows, epochs, "group_by_length", workload.folder)
                trained = time.perf_counter()
                scores[f"{rank} {epochs}"] = _score(model.eval(), tokenizer, questions)
                model.unload()
        return {"trained_at": trained, "gestalt": scores}

    return work


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], epochs: int, order: str, folder: Path) -> None:
    """HF Trainer on `model`. order: what Trainer calls a sampling strategy."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory(dir=folder) as place:
        arguments = TrainingArguments(
            output_dir=place, per_device_train_batch_size=ROUND, num_train_epochs=epochs, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", train_sampling_strategy=order, save_strategy="epoch",
            save_only_model=True, logging_steps=10, report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True)).train()


def encoded(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """A row as Trainer takes it; only the answer has labels."""
    asked = tokenizer(row["prompt"]).input_ids
    answer = [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
    whole = [*asked, *answer]
    return {"input_ids": whole, "labels": [-100] * len(asked) + answer, "attention_mask": [1] * len(whole)}


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> list[str]:
    """First lines of greedy answers, in the questions' order; those of similar length are asked together."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(questions)), key=lambda place: len(questions[place]["prompt"]))
    texts = [""] * len(questions)
    for start in range(0, len(order), ROUND):
        batch = order[start : start + ROUND]
        asked = tokenizer([questions[place]["prompt"] for place in batch], return_tensors="pt", padding=True, return_token_type_ids=False)
        made = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for place, ids in zip(batch, made[:, asked.input_ids.shape[1] :], strict=True):
            texts[place] = first_line(tokenizer.decode(ids, skip_special_tokens=True))
    tokenizer.padding_side = "right"
    return texts


def _score(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> float:
    texts = answers(model, tokenizer, questions)
    ratios = [
        difflib.SequenceMatcher(None, text, row["answer"], autojunk=False).ratio() for text, row in zip(texts, questions, strict=True)
    ]
    return sum(ratios) / len(questions)


ARMS: dict[str, Callable[[Workload], Work]] = {"ours": ours, "plain": plain}


def main() -> None:
    torch.set_num_threads(1)
    arm, folder = sys.argv[1:3]
    talk = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    work = ARMS[arm](Workload(Path(folder), is_shared=False))
    for _ in sys.stdin:
        started = time.perf_counter()
        told = work()
        seconds = time.perf_counter() - started
        line = {"seconds": seconds, "training_s": told.pop("trained_at") - started, **told}
        os.write(talk, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    main()
