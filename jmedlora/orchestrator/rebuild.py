"""MLflow written again from storage, while no driver works on the sweep."""

from __future__ import annotations

from jmedlora.orchestrator.ledger import driver_lock, standing
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan
from jmedlora.report.writer import ReportFiles, write_report
from jmedlora.tracking.location import tracking_uri

_LOGGED = ("run_key", "evaluation_key", "step", "metric", "difference", "p", "p_holm")


def changes_of(report: ReportFiles, is_evaluated: bool) -> list[Record]:
    """What MLflow is told of how runs differ from their bases: once all is evaluated, since what comes later changes the correction."""
    if not is_evaluated:
        return []
    return [{key: getattr(row, key) for key in _LOGGED} for row in report.statistics.against_base]


def rebuild_mlflow(plan: Plan, storage: Storage) -> tuple[ReportFiles, int]:
    """Writes the report, and then MLflow from it and storage; returns the report, and how many runs and bases MLflow holds now.

    Raises HeldByAnother where a living driver works on the sweep, and NotTracked where MLflow cannot be written.
    """
    with driver_lock(storage.sweep(plan.sweep)):
        report = write_report(plan, storage)
        from jmedlora.tracking.rebuilding import rebuild  # takes seconds

        return report, rebuild(
            tracking_uri(storage), plan, storage, report.folder, changes_of(report, standing(plan, storage).is_evaluated)
        )
