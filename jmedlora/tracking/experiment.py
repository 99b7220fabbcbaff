"""A sweep's experiment in MLflow, and its parent run."""

from __future__ import annotations

import json

from mlflow import MlflowClient
from mlflow.entities import Run

from jmedlora.plan.specs import Plan
from jmedlora.tracking.entities import metric_prefix, milliseconds
from jmedlora.tracking.location import VIEW

ROLE = "jmedlora.role"
SWEEP_ROLE = "sweep"
RUN_KEY = "jmedlora.run_key"
PARENT = "mlflow.parentRunId"
REPLACED = "jmedlora.replaced"
_KIND = ("mlflow.experimentKind", "custom_model_development")


def find_or_create_experiment(client: MlflowClient, plan: Plan, artifacts: str | None) -> str:
    """The id of the sweep's experiment, taken out of the bin if it was deleted; `artifacts` is used where it is new."""
    experiment = client.get_experiment_by_name(plan.sweep)
    if experiment is None:
        experiment_id = client.create_experiment(plan.sweep, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment_id)
    mark_experiment(client, experiment_id)
    for key, value in {"mlflow.note.content": _description(plan), f"mlflow.sharedViewState.{VIEW}": _view_state(plan)}.items():
        client.set_experiment_tag(experiment_id, key, value)
    return str(experiment_id)


def mark_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Tells the kind of the experiment, without which MLflow's page asks what it is for."""
    client.set_experiment_tag(experiment_id, *_KIND)


def discard(client: MlflowClient, run_id: str) -> None:
    """Deletes a run for good: marked, so that it is told from the others when the whole experiment is deleted and restored."""
    client.set_tag(run_id, REPLACED, "true")
    client.delete_run(run_id)


def find_or_create_parent(client: MlflowClient, experiment_id: str, plan: Plan, started: float, found: list[Run], held: str) -> str:
    """The id of the sweep's parent run among the experiment's runs `found`, or of a new one; deletes what is there beside it.

    started: when the sweep did, in seconds since the epoch; held: the parent so far, empty where none is known.
    """
    parents = [run.info.run_id for run in found if run.data.tags.get(ROLE) == SWEEP_ROLE]
    if not parents:
        tags = {ROLE: SWEEP_ROLE, "mlflow.note.content": _description(plan), "mlflow.source.name": "jmedlora"}
        return str(client.create_run(experiment_id, start_time=milliseconds(started), tags=tags, run_name=plan.sweep).info.run_id)
    followed = [run.data.tags.get(PARENT) for run in found]
    kept = max(sorted(parents), key=lambda run_id: (run_id == held, followed.count(run_id)))
    for run_id in parents:
        if run_id != kept:
            discard(client, run_id)
    return kept


def runs_of_experiment(client: MlflowClient, experiment_id: str) -> list[Run]:
    """All runs of the experiment that are not deleted."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _description(plan: Plan) -> str:
    benchmarks = ", ".join(sorted({item.benchmark.name for item in plan.evaluations}))
    data = ", ".join(sorted({f"{run.data.name} ({run.rows} rows)" for run in plan.runs}))
    return (
        f"Sweep **{plan.sweep}**: {len(plan.runs)} runs over {len(plan.bases)} bases, trained on {data or 'nothing'}, "
        f"scored on {benchmarks or 'nothing'}. Step 0 of a run is its base in the same precision. For research, not for clinical use."
    )


def _view_state(plan: Plan) -> str:
    """What MLflow's page shows of a sweep when it is opened through the sweep's address: the children, the best first.

    By itself the page folds the children away below their parent, and then has nothing to draw charts of.
    """
    scores = [f"metrics.`{metric_prefix(plan, item)}/gestalt_score`" for item in plan.evaluations]
    columns = [f"params.`{key}`" for key in ("model", "method", "precision", "lora_rank", "epochs")]
    return json.dumps(
        {
            "searchFilter": f"tags.`{ROLE}` != '{SWEEP_ROLE}'",
            "orderByKey": scores[0] if scores else "attributes.start_time",
            "orderByAsc": False,
            "selectedColumns": [*columns, *scores],
            "runsHiddenMode": "FIRST_20_RUNS",
        }
    )
