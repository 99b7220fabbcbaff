"""Reading what runs and evaluations have left in storage; a damaged file is told by its path, as BadInput."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jmedlora.config.faults import BadInput, Fault
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec

Record = dict[str, Any]

_SCORES = ("n", "accuracy", "exact_match", "gestalt_score", "seconds", "time")
_MADE_AGAIN = "delete it: the sweep makes it again"


def read_run(storage: Storage, run_key: str) -> Record | None:
    """run.json, or None for a run that has not begun."""
    return _read_json(storage.run(run_key).run_json, ("status",))


def read_training(storage: Storage, run_key: str) -> list[Record]:
    """The records of train.jsonl, one per optimizer step, in order; of a step taken twice (after a restart) the later one."""
    by_step = {record["step"]: record for record in _read_lines(storage.run(run_key).train_jsonl, ("step",))}
    return [by_step[step] for step in sorted(by_step)]


def read_metrics(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec) -> Record | None:
    """metrics.json, or None for an evaluation that is not finished."""
    return _read_json(storage.run(run_key).evaluation(evaluation.folder, step) / METRICS, _SCORES)


def read_predictions(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, keys: tuple[str, ...] = ()) -> list[Record]:
    """The lines of predictions.jsonl, one per question, each with at least `keys`; empty where there are none yet."""
    return _read_lines(storage.run(run_key).evaluation(evaluation.folder, step) / PREDICTIONS, keys)


def steps_of(spec: RunSpec | BaseSpec) -> list[int]:
    """Optimizer steps at which a run is evaluated: a base at step 0 alone, a run at its checkpoints."""
    return list(spec.checkpoint_steps) if isinstance(spec, RunSpec) else [0]


def finished_metrics(plan: Plan, storage: Storage, spec: RunSpec | BaseSpec) -> Iterator[tuple[int, EvaluationSpec, Record]]:
    """What is evaluated of one run or base, by step and then in the plan's order of evaluations."""
    for step in steps_of(spec):
        for evaluation in plan.asked_of(spec):
            metrics = read_metrics(storage, spec.run_key, step, evaluation)
            if metrics is not None:
                yield step, evaluation, metrics


def damaged(where: str, reason: str, remedy: str) -> BadInput:
    """What to raise for a file in storage that is not what the program wrote there."""
    return BadInput([Fault(where, "", f"damaged: {reason}", remedy)])


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise damaged(str(path), "not UTF-8", _MADE_AGAIN) from None


def _read_json(path: Path, keys: tuple[str, ...]) -> Record | None:
    text = _read_text(path)
    return None if text is None else _parse(text, keys, str(path), _MADE_AGAIN)


def _parse(text: str, keys: tuple[str, ...], where: str, remedy: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise damaged(where, f"not JSON: {error}", remedy) from None
    missing = [key for key in keys if key not in record] if isinstance(record, dict) else ["a mapping"]
    if missing:
        raise damaged(where, f"without {', '.join(missing)}", remedy)
    return record


def _read_lines(path: Path, keys: tuple[str, ...] = ()) -> list[Record]:
    """A last line that is still being written is left out."""
    text = _read_text(path)
    if text is None:
        return []
    remedy = f"delete the folder {path.parent}: the sweep makes it again"
    # split on line feeds only: answers may hold characters that str.splitlines takes for line ends
    *whole, last = text.split("\n")
    records = [_parse(line, keys, f"{path}:{number}", remedy) for number, line in enumerate(whole, start=1) if line]
    try:
        return [*records, json.loads(last)] if last else records
    except json.JSONDecodeError:
        return records
