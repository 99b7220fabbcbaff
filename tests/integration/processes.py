"""Running the command line in a process of its own, as a user does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_jmedlora(*arguments: str, cwd: Path, timeout_s: float = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    """`jmedlora ARGUMENTS`; output captured as text."""
    return subprocess.run(
        [sys.executable, "-m", "jmedlora.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run_training_workers(folder: Path, workers: int = 2) -> None:
    """Trains the trials of `folder`/trials.json with a group of workers, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1", "JMEDLORA_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-W", "error::UserWarning:jmedlora", str(ROOT / "tests/integration/training_worker.py"), str(folder)]
    logs = [(folder / f"{rank}.log").open("wb") for rank in range(workers)]
    group = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [worker.wait(timeout=240) for worker in group]
    finally:
        for worker, log in zip(group, logs, strict=True):
            worker.kill()
            log.close()
    assert codes == [0] * workers, "".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(workers))
