"""Opening MLflow on a sweep."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import webbrowser
from pathlib import Path

from mlflow import MlflowClient

from jmedlora.plan.layout import Storage
from jmedlora.tracking.location import VIEW, is_server, tracking_uri

_HOST = "127.0.0.1"
# MLflow's job runners (for judging traces) are seven processes of 240 MB that nothing here uses
_NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_ui(storage: Storage, sweep: str, port: int = 5000) -> int:
    """Prints the sweep's address and serves MLflow until it is interrupted, or opens the server's page; returns an exit code."""
    uri = tracking_uri(storage)
    address = _address(uri, sweep, port)
    print(f"{sweep}: {address}", flush=True)
    if is_server(uri):
        webbrowser.open(address)
        return 0
    try:
        command = [sys.executable, "-m", "mlflow", *_arguments(uri, port)]
        return subprocess.run(command, env=os.environ | _NO_JOBS, check=False).returncode
    except KeyboardInterrupt:  # how people end it
        return 0


def ui_command(storage: Storage, sweep: str, port: int = 5000) -> str:
    """The shell line that does what `open_ui` does; the sweep's address stands in its comment."""
    uri = tracking_uri(storage)
    address = _address(uri, sweep, port)
    command = (
        ["python", "-m", "webbrowser", address]
        if is_server(uri)
        else ["env", *(f"{key}={value}" for key, value in _NO_JOBS.items()), "mlflow", *_arguments(uri, port)]
    )
    return f"{shlex.join(command)}  # {sweep}: {address}"


def _arguments(uri: str, port: int) -> list[str]:
    return ["ui", "--backend-store-uri", uri, "--host", _HOST, "--port", str(port), "--workers", "1"]


def _address(uri: str, sweep: str, port: int) -> str:
    root = uri.rstrip("/") if is_server(uri) else f"http://{_HOST}:{port}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{root}/#/experiments"  # a client would create the database
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(sweep)
    if experiment is None:
        return f"{root}/#/experiments"
    return f"{root}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
