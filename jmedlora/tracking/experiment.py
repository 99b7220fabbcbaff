"""A sweep's experiment in MLflow, and its parent run."""

from __future__ import annotations

import json

from mlflow import MlflowClient
from mlflow.entities import Run

from jmedlora.config.clock import now
from jmedlora.plan.specs import Plan
from jmedlora.tracking.entities import metric_prefix, milliseconds
from jmedlora.tracking.location import VIEW

ROLE = "jmedlora.role"
SWEEP_ROLE = "sweep"


def find_or_create_experiment(client: MlflowClient, plan: Plan, artifacts: str | None) -> str:
    """The id of the sweep's experiment, taken out of the bin if it was deleted; `artifacts` is used where it is new."""
    experiment = client.get_experiment_by_name(plan.sweep)
    if experiment is None:
        experiment_id = client.create_experiment(plan.sweep, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment_id)
    # without the kind, MLflow's page asks what the experiment is for
    tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": _description(plan)}
    for key, value in (tags | {f"mlflow.sharedViewState.{VIEW}": _view_state(plan)}).items():
        client.set_experiment_tag(experiment_id, key, value)
    return experiment_id


def create_parent(client: MlflowClient, experiment_id: str, plan: Plan) -> str:
    """The id of a new parent run."""
    tags = {ROLE: SWEEP_ROLE, "mlflow.note.content": _description(plan), "mlflow.source.name": "jmedlora"}
    return client.create_run(experiment_id, start_time=milliseconds(now()), tags=tags, run_name=plan.sweep).info.run_id


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
