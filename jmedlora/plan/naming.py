"""Names for people: a run's name says what sets it apart within its sweep."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jmedlora.plan.specs import BaseSpec, Plan, RunSpec

# Settings that a name tells where a sweep varies them, with the short form of each.
_VARIED = {
    "alpha": "a",
    "dropout": "do",
    "targets": "",
    "learning_rate": "lr",
    "schedule": "",
    "warmup_steps": "wu",
    "batch_size": "b",
    "weight_decay": "wd",
    "max_grad_norm": "clip",
    "length_grouping": "grouped",
    "max_input_tokens": "in",
    "max_target_tokens": "out",
    "data": "",
    "prompt": "",
    "seed": "seed",
}


def number(value: float) -> str:
    """The shortest spelling that reads back as the same number: `3`, `0.5`, `5e-05`."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def epochs_of(run: RunSpec) -> float:
    """Passes over the data, also where the duration was given in steps; rounded to four digits."""
    return run.settings.epochs if run.settings.epochs is not None else round(run.total_steps / run.steps_per_epoch, 4)


def duration_of(run: RunSpec) -> str:
    """`3ep`, or `900 steps` where the duration was given in steps."""
    return f"{number(run.settings.epochs)}ep" if run.settings.epochs is not None else f"{run.total_steps} steps"


def targets_of(run: RunSpec) -> str:
    """The LoRA targets as one word, or module names joined by a comma."""
    targets = run.settings.targets
    return targets if isinstance(targets, str) else ",".join(targets)


def names_of(plan: Plan) -> dict[str, str]:
    """run_key -> name of every run and base, such as `smollm2-135m lora r16 3ep`; different runs have different names."""
    # what differs between methods or models alone is told by their names
    groups: dict[tuple[str, str], list[RunSpec]] = {}
    for run in plan.runs:
        groups.setdefault((run.model.name, run.method.name), []).append(run)
    names: dict[str, str] = {}
    for runs in groups.values():
        varied = _varied_settings(runs)
        names |= {run.run_key: _run_name(run, varied) for run in runs}
    precisions = Counter(base.model.name for base in plan.bases)
    of_runs = {run.base_key for run in plan.runs}
    names |= {base.run_key: _base_name(base, precisions[base.model.name] > 1, base.run_key in of_runs) for base in plan.bases}
    shared = Counter(names.values())
    return {key: name if shared[name] == 1 else f"{name} {key[:6]}" for key, name in names.items()}


def _varied_settings(runs: list[RunSpec]) -> list[str]:
    return [key for key in _VARIED if len({_told(run, key) for run in runs}) > 1]


def _told(run: RunSpec, key: str) -> str:
    return targets_of(run) if key == "targets" else _spell(getattr(run.settings, key))


def _spell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _run_name(run: RunSpec, varied: list[str]) -> str:
    words = [run.model.name, run.method.name, f"r{run.settings.rank}", duration_of(run)]
    for key in varied:
        if isinstance(flag := getattr(run.settings, key), bool):
            words += [_VARIED[key]] if flag else []
        else:
            words.append(_VARIED[key] + _told(run, key))
    return " ".join(filter(None, words))


def _base_name(base: BaseSpec, several: bool, is_tuned: bool) -> str:
    """A model that is only evaluated as it is goes by its own name."""
    words = [base.model.name, "base" if is_tuned else "", base.precision if several else ""]
    return " ".join(filter(None, words))
