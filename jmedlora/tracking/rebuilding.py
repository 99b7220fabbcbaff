"""MLflow written again from storage alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jmedlora.config.faults import BadInput
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan
from jmedlora.tracking.mlflow_tracker import MlflowTracker
from jmedlora.tracking.sweep_record import how_it_ended
from jmedlora.tracking.trouble import NotTracked, told


def rebuild(tracking_uri: str, plan: Plan, storage: Storage, report: Path, changes: Sequence[Record]) -> int:
    """Writes what is missing; returns the number of runs and bases. Done twice, the second time changes nothing.

    The sweep counts as over, as its ledger says; no driver may work on it. report: the folder of its report; changes: how runs
    differ from their bases. Raises NotTracked, after which it may be called again, and BadInput for damaged files in storage.
    """
    ending, ended = how_it_ended(plan, storage)
    try:
        tracker = MlflowTracker(tracking_uri, plan, storage)
        tracker.start(ending)
        tracker.restore_from_storage()
        tracker.log_changes(changes)
        tracker.log_report(report)
        tracker.finish_sweep(ending, ended)
    except BadInput:
        raise
    except Exception as error:
        raise NotTracked(told(error)) from error
    return len(plan.bases) + len(plan.runs)
