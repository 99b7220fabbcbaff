"""Tokens per second of training steps and of greedy answers: ours, and what one would write without us, in turns on one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from jmedlora.evaluation.generation import decode_greedily, encode_prompts
from jmedlora.models.random_models import byte_tokenizer, random_base
from jmedlora.plan.costs import training_flop_per_token
from jmedlora.plan.shapes import target_layers
from jmedlora.training.process import Worker
from tests.bench.cases import Case, base_cases
from tests.bench.rig import Rig, rig_of

ROUNDS = 2
WARM_UP = 1
QUESTIONS = 32
NEW_TOKENS = 32
BATCH = 16


def compare_steps(case: Case, worker: Worker, steps: int, base: PreTrainedModel | None = None) -> dict[str, Any]:
    """Median seconds of a step, ours and a plain loop's, over rounds of `steps` in turns (ABAB).

    A plain loop trains one adapter at a time: its step has the tokens of one.
    """
    base = base or random_base(case.family, case.shape, case.precision, case.compute, True, worker.device)
    taken: dict[str, list[float]] = {"ours": [], "plain": []}
    tokens = 0
    for _ in range(ROUNDS):
        with rig_of(case, worker, base) as rig:
            tokens = rig.tokens_per_step
            taken["ours"] += _seconds(rig.step, worker, steps)
            batch = rig
        taken["plain"] += _seconds(_plain_loop(case, base, batch, worker), worker, steps)
    ours, plain = (statistics.median(taken[name]) for name in ("ours", "plain"))
    flop = training_flop_per_token(case.spec(), case.shape) * tokens
    return {
        "tokens_per_step": tokens,
        "ours_tokens_per_s": tokens / ours,
        "plain_tokens_per_s": tokens / case.adapters / plain,
        "faster": plain * case.adapters / ours,
        "tflops": flop / ours / 1e12,
        "ours_s": [round(each, 4) for each in taken["ours"]],
        "plain_s": [round(each, 4) for each in taken["plain"]],
    }


def _seconds(step: Callable[[], Any], worker: Worker, steps: int) -> list[float]:
    """Seconds of each step after a warm-up."""
    found = []
    for place in range(WARM_UP + steps):
        _wait(worker)
        started = time.perf_counter()
        step()
        _wait(worker)
        if place >= WARM_UP:
            found.append(time.perf_counter() - started)
    return found


def _wait(worker: Worker) -> None:
    if worker.device.type == "cuda":
        torch.cuda.synchronize()


def _plain_loop(case: Case, base: PreTrainedModel, rig: Rig, worker: Worker) -> Callable[[], float]:
    """PEFT, torch's AdamW and transformers' own loss: fp32 adapters under autocast, as PEFT's examples train."""
    names = sorted({layer.name for layer in target_layers(case.family, case.shape, case.targets)})
    adapted = get_peft_model(base, LoraConfig(r=case.rank, lora_alpha=32, lora_dropout=case.dropout, target_modules=names)).train()
    if case.checkpointing:
        adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = rig.batch.input_ids[: case.rows]
    labels = ids.clone()
    labels[:, : case.input_tokens] = -100

    def step() -> float:
        total = 0.0
        for _ in range(case.accumulated):
            with torch.autocast(worker.device.type, torch.bfloat16, enabled=case.compute == "bf16"):
                loss = adapted(input_ids=ids, labels=labels, use_cache=False).loss / case.accumulated
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return _Detached(step, adapted, case.checkpointing)


class _Detached:
    """A plain loop whose adapter leaves the base model as it was, once it is let go."""

    def __init__(self, step: Callable[[], float], adapted: Any, checkpointing: bool):
        self._step, self._adapted, self._checkpointing = step, adapted, checkpointing

    def __call__(self) -> float:
        return self._step()

    def __del__(self) -> None:
        if self._checkpointing:
            self._adapted.get_base_model().gradient_checkpointing_disable()
        self._adapted.unload()


def compare_generation(name: str, tiny: bool, worker: Worker) -> dict[str, Any]:
    """New tokens per second of greedy answers, ours and `generate`'s, in turns; how many answers are the same."""
    case = base_cases(tiny)[name]
    model = random_base(case.family, case.shape, case.precision, case.compute, True, worker.device)
    tokenizer = byte_tokenizer()
    example = "例題：次のうち正しいものを選べ。糖尿病、高血圧、肺炎、貧血。答え：肺炎。" * (1 if tiny else 3)
    texts = [f"{example}問題：{'患者は発熱を訴える。' * (1 + place % 5)}第{place}問の答えは" for place in range(QUESTIONS)]
    prompts = encode_prompts(tokenizer, texts, 1500)
    taken: dict[str, list[float]] = {"ours": [], "plain": []}
    answers: dict[str, list[str]] = {}
    tokens: dict[str, int] = {}
    for round_ in range(ROUNDS + 1):
        for way, answer in (("ours", _ours), ("plain", _generate)):
            _wait(worker)
            started = time.perf_counter()
            answers[way], tokens[way] = answer(model, tokenizer, prompts, worker)
            _wait(worker)
            if round_:
                taken[way].append(time.perf_counter() - started)
    ours, plain = (min(taken[way]) for way in ("ours", "plain"))
    return {
        "prompts": QUESTIONS,
        "prompt_tokens": prompts.tokens,
        "ours_new_tokens_per_s": tokens["ours"] / ours,
        "plain_new_tokens_per_s": tokens["plain"] / plain,
        "ours_s": ours,
        "plain_s": plain,
        "faster": plain / ours,
        "same_answers": sum(a == b for a, b in zip(answers["ours"], answers["plain"], strict=True)),
    }


def _ours(model: Any, tokenizer: Any, prompts: Any, worker: Worker) -> tuple[list[str], int]:
    done = decode_greedily(model, tokenizer, prompts, NEW_TOKENS, BATCH, worker.device)
    return [_first_line(text) for text in done.texts], done.new_tokens


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, prompts: Any, worker: Worker) -> tuple[list[str], int]:
    """`generate` in batches, padded on the left; it goes on after a line break, where ours stops."""
    texts, tokens = [], 0
    for start in range(0, QUESTIONS, BATCH):
        rows = prompts.token_ids[start : start + BATCH]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=worker.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=worker.device)
        answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, width:]
        tokens += answer.numel()
        texts += [_first_line(tokenizer.decode(row, skip_special_tokens=True)) for row in answer]
    return texts, tokens


def _first_line(text: str) -> str:
    return text.lstrip().split("\n", 1)[0]
