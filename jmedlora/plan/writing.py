"""The plan in storage: the sweep as it was composed, and what was planned from it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from pydantic import ValidationError

from jmedlora.config.sweep import SweepConfig
from jmedlora.data.atomic import write_text
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import damaged
from jmedlora.plan.specs import Plan


def write_plan(config: SweepConfig, plan: Plan, storage: Storage) -> None:
    """Writes sweep.yaml (presets resolved, paths absolute) and plan.json into the sweep's folder."""
    folder = storage.sweep(plan.sweep)
    write_text(folder.sweep_yaml, yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=140))
    with plans_lock(storage):
        write_text(folder.plan_json, plan.model_dump_json(indent=1))


@contextmanager
def plans_lock(storage: Storage) -> Iterator[None]:
    """Holds the plans of all sweeps of a storage: none is written while what no plan needs is being removed."""
    storage.plans_lock.parent.mkdir(parents=True, exist_ok=True)
    with storage.plans_lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_plan(storage: Storage, sweep: str) -> Plan | None:
    """The plan of the last start, or None; raises BadInput where the file is damaged."""
    path = storage.sweep(sweep).plan_json
    if not path.is_file():
        return None
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        detail = error.errors()[0]
        reason = ".".join(map(str, detail["loc"])) + f" {detail['msg']}"
        raise damaged(str(path), reason.strip(), "delete it: `jmedlora sweep` writes it again") from None
