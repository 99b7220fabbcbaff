"""Opening MLflow on a sweep."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

from mlflow import MlflowClient

from jmedlora.config.faults import BadInput, Fault
from jmedlora.plan.layout import Storage
from jmedlora.tracking.location import VIEW, is_server, tracking_uri

_HOST = "127.0.0.1"
_ANSWER_S = 120.0
_END_S = 10.0
# MLflow's job runners (for judging traces) are seven processes of 240 MB that nothing here uses
_NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_ui(storage: Storage, sweep: str, port: int = 5000) -> int:
    """Serves MLflow until it is interrupted or terminated, or opens the server's page; returns an exit code.

    The sweep's address is printed once its page answers. Raises BadInput where the port is taken.
    """
    uri = tracking_uri(storage)
    address = sweep_address(uri, sweep, port)
    if is_server(uri):
        print(f"{sweep}: {address}", flush=True)
        webbrowser.open(address)
        return 0
    _refuse_taken(port)
    print("starting MLflow ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "mlflow", *_arguments(uri, port)]
    previous = signal.signal(signal.SIGTERM, _interrupt)
    # a session of its own: an interruption reaches this process alone, which then ends MLflow with all that it started
    server = subprocess.Popen(command, env=os.environ | _NO_JOBS, stdout=sys.stderr, start_new_session=True)
    try:
        if _answers(server, port):
            print(f"{sweep}: {address}", flush=True)
        return server.wait()
    except KeyboardInterrupt:  # how people end it
        return 0
    finally:
        _end(server)
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise BadInput(
                [Fault("command line", "--port", f"{port}: {getattr(error, 'strerror', None) or error}", "a free port")]
            ) from None


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Waits for the page; False where MLflow ends or takes longer than `_ANSWER_S`."""
    deadline = time.monotonic() + _ANSWER_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.5)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server's process group; what has not gone after `_END_S` is killed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # all of them are gone
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_END_S)


def _arguments(uri: str, port: int) -> list[str]:
    return ["ui", "--backend-store-uri", uri, "--host", _HOST, "--port", str(port), "--workers", "1"]


def sweep_address(uri: str, sweep: str, port: int) -> str:
    """Address of the page that shows a sweep: on the tracking server, or on this machine at `port`."""
    root = uri.rstrip("/") if is_server(uri) else f"http://{_HOST}:{port}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{root}/#/experiments"  # a client would create the database
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(sweep)
    if experiment is None:
        return f"{root}/#/experiments"
    return f"{root}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
