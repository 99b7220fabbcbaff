"""The command that opens MLflow on a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path

from mlflow import MlflowClient

from jmedlora.plan.layout import Storage
from jmedlora.tracking.location import LOCAL_SERVER, VIEW, is_server, tracking_uri


def ui_command(storage: Storage, sweep: str) -> str:
    """One shell line: it starts MLflow, or opens the server's page; the sweep's address stands in its comment."""
    uri = tracking_uri(storage)
    page = _experiment_page(uri, sweep)
    if is_server(uri):
        address = f"{uri.rstrip('/')}/{page}"
        return f"python -m webbrowser {shlex.quote(address)}  # experiment {sweep}"
    host, _, port = LOCAL_SERVER.partition(":")
    command = f"mlflow ui --backend-store-uri {shlex.quote(uri)} --host {host} --port {port}"
    return f"{command}  # experiment {sweep}: http://{LOCAL_SERVER}/{page}"


def _experiment_page(uri: str, sweep: str) -> str:
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return "#/experiments"  # a client would create the database
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(sweep)
    if experiment is None:
        return "#/experiments"
    return f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
