"""Answers of many checkpoints, ours and others', in turns: the ratio `eval-generate`.

Twelve adapters to one base model and a hundred questions. Ours: one evaluator, adapters decoded in one batch. `reload`: base and
adapter from disk for each checkpoint, `generate`. `lm-eval`: lm-evaluation-harness' model class for transformers, with a task of ours.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.evaluation.metrics import first_line
from jmedlora.evaluation.results import Checkpoint
from jmedlora.models.adapters import base_name, save_adapter
from jmedlora.models.lora import PREFIX, initial, lora_config, target_modules
from jmedlora.plan.layout import PREDICTIONS, Storage
from jmedlora.plan.planner import open_sweep
from jmedlora.plan.specs import Plan
from tests.bench.explaining import where_time_goes
from tests.bench.measuring import Arm, Row, Taken, in_turns, row_of
from tests.bench.workload import NEW_TOKENS, ROUND, Workload, write_sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACK = 8
"""Adapters at once, as `pack: auto` has it in evaluation."""


@dataclass(frozen=True)
class Questions:
    """A workload whose runs are trained: what is asked, and the adapters that are asked."""

    workload: Workload
    plan: Plan
    storage: Storage
    sources: Path

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(run.run_key, run.total_steps) for run in self.plan.runs]

    @property
    def adapters(self) -> list[Path]:
        return [self.storage.run(run_key).checkpoint(step) for run_key, step in self.checkpoints]

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.workload.rows("questions")]


def drawn(workload: Workload) -> Questions:
    """Adapters with random weights, so strong that each answers as no other does: such answers seldom end by themselves."""
    config, plan = open_sweep(str(write_sweep(workload, workload.folder / "sweep")), [f"storage={workload.folder / 'results'}"])
    storage = Storage(config.storage_path)
    base = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for run in plan.runs:
        targets = target_modules(base, run.settings, "llama")
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in base.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.rsplit(".", 1)[-1] in targets:
                up = torch.randn(layer.out_features, run.settings.rank, generator=generator) / run.settings.rank**0.5
                down = initial(PREFIX + name, run.settings.rank, layer.in_features, run.settings.seed)
                tensors |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
        save_adapter(
            storage.run(run.run_key).checkpoint(run.total_steps), tensors, lora_config(run.settings, targets), base_name(run.model)
        )
    return Questions(workload, plan, storage, Path(config.sources))


def ours(asked: Questions) -> Arm:
    """From loading the base to the scores of all; the answers come from the stored predictions."""
    [evaluation], [base] = asked.plan.evaluations, asked.plan.bases

    def turn() -> Taken:
        started = time.perf_counter()
        evaluator = Evaluator(base.model, base.precision, base.compute_precision, True, asked.sources, True)
        outcomes = evaluator.evaluate_together(asked.checkpoints, evaluation, asked.storage, PACK)
        seconds = time.perf_counter() - started
        assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
        folders = [asked.storage.run(run_key).evaluation(evaluation.folder, step) for run_key, step in asked.checkpoints]
        found = [[json.loads(line)["prediction"] for line in (folder / PREDICTIONS).read_text("utf-8").splitlines()] for folder in folders]
        return Taken(seconds, found)

    return turn


def reload(asked: Questions) -> Arm:
    """Base and adapter from disk for each checkpoint, then `generate` over the questions as they come."""

    def turn() -> Taken:
        started = time.perf_counter()
        found = [_generated(asked, adapter) for adapter in asked.adapters]
        return Taken(time.perf_counter() - started, found)

    return turn


def _opened(asked: Questions, adapter: Path) -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(asked.workload.model, dtype=torch.float32).to(DEVICE)
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(asked.workload.model, padding_side="left")


@torch.inference_mode()
def _generated(asked: Questions, adapter: Path) -> list[str]:
    model, tokenizer = _opened(asked, adapter)
    texts: list[str] = []
    for start in range(0, len(asked.prompts), ROUND):
        batch = tokenizer(asked.prompts[start : start + ROUND], return_tensors="pt", padding=True, return_token_type_ids=False).to(DEVICE)
        made = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def harness(asked: Questions) -> Arm:
    """lm-evaluation-harness, a model of its own for each checkpoint; that it looks through its own tasks first (6 s) is left out."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = asked.workload.folder / "harness.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked.workload.rows("questions")), encoding="utf-8")
    config = {
        "task": "bench",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda row: row["prompt"],
        "doc_to_target": lambda row: row["answer"],
        "process_results": lambda row, texts: {"exact": float(texts[0].strip() == row["answer"])},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
    }

    manager = TaskManager()

    def turn() -> Taken:
        started = time.perf_counter()
        task = ConfigurableTask(config=config)
        found = []
        for adapter in asked.adapters:
            model = HFLM(str(asked.workload.model), peft=str(adapter), batch_size=ROUND, device=DEVICE, dtype="float32")
            samples = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)["samples"]["bench"]
            found.append([sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])])
        return Taken(time.perf_counter() - started, found)

    return turn


def agreement(asked: Questions, ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> str:
    """How many first lines are the same; and where others part, by how much a model asked alone preferred its token.

    Where an answer begins with a line break, ours goes on to the line behind it, and lm-eval ends: these are told apart.
    """
    different = [
        (place, number)
        for place, (own, other) in enumerate(zip(ours, theirs, strict=True))
        for number, (mine, their) in enumerate(zip(own, other, strict=True))
        if first_line(mine) != first_line(their)
    ]
    total = sum(map(len, ours))
    told = f"{total - len(different)} of {total} answers are the same"
    ended = [(place, number) for place, number in different if not theirs[place][number] and ours[place][number][:1].isspace()]
    if ended:
        told += f", {len(ended)} begin with a line break, where theirs ends"
        different = [each for each in different if each not in ended]
    if not different:
        return told
    gaps = [_gap(asked, place, number, [ours[place][number], theirs[place][number]]) for place, number in different]
    return f"{told}; the others part where two best tokens are {max(gaps):.0e} apart, or less"


@torch.inference_mode()
def _gap(asked: Questions, adapter: int, question: int, texts: Sequence[str]) -> float:
    """Between the two greatest logits of the answer of a model asked alone, where one of the texts first says something else.

    A token may be a part of a character; the gap is the smallest of the four tokens up to there.
    """
    model, tokenizer = _opened(asked, asked.adapters[adapter])
    prompt = tokenizer(asked.prompts[question], return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    alone = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True)
    answer = alone.sequences[0, prompt.input_ids.shape[1] :]
    best = torch.stack([logits[0] for logits in alone.logits]).topk(2).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    for count in range(1, len(answer) + 1):
        said = tokenizer.decode(answer[:count], skip_special_tokens=True).rstrip("\ufffd")
        if not all(text.startswith(said) for text in texts):
            return min(gaps[max(0, count - 4) : count])
    return gaps[-1]


def eval_generate(workload: Workload, pairs: int) -> list[Row]:
    """A row for each baseline that is installed."""
    asked = drawn(workload)
    baselines = {"reload": reload(asked)}
    if importlib.util.find_spec("lm_eval") is not None:
        baselines["lm-eval"] = harness(asked)
    else:
        print("lm-eval is not installed: pip install -e '.[bench]'")
    own = ours(asked)
    mine, *others = in_turns([own, *baselines.values()], pairs)
    words = f"{len(asked.adapters)} checkpoints x {len(asked.prompts)} questions, {NEW_TOKENS} new tokens at most, {PACK} adapters at once"
    notes = [words, where_time_goes(own, "ours"), where_time_goes(baselines["reload"], "reload")]
    return [
        row_of("eval-generate", baseline, mine, theirs, agreement(asked, mine[-1].found, theirs[-1].found), notes=notes)
        for baseline, theirs in zip(baselines, others, strict=True)
    ]
