"""`open_ui` serves the sweep's own database."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from jmedlora.plan.layout import Storage
from jmedlora.tracking.mlflow_tracker import MlflowTracker
from tests.made_up import base_spec, plan_of, run_spec

SERVE = "import sys; from pathlib import Path; from jmedlora.plan.layout import Storage; from jmedlora.tracking.ui import open_ui; \
sys.exit(open_ui(Storage(Path(sys.argv[1])), 'demo', int(sys.argv[2])))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def experiment_named(name: str, port: int) -> dict[str, str]:
    """Asked again until the server is there."""
    address = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    for _ in range(120):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["experiment"]
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not come up")


def test_the_page_is_served_on_the_sweeps_database(tmp_path: Path) -> None:
    storage, port = Storage(tmp_path), free_port()
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    MlflowTracker(f"sqlite:///{storage.mlflow_database}", plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")]), storage).start()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path), str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        told = server.stdout.readline()
        experiment = experiment_named("demo", port)
        assert told.startswith(f"demo: http://127.0.0.1:{port}/#/experiments/{experiment['experiment_id']}/runs?")
        assert experiment["artifact_location"] == (tmp_path / "mlartifacts/demo").as_uri()
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.communicate(timeout=60)
    assert server.returncode == 0
