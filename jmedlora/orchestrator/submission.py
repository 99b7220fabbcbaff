"""A sweep as a Ray job."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import tempfile
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import is_remote, job_script

STOP_WAIT_S = 600
"""How long a job that is stopped may take to save; Ray kills it after three seconds unless told otherwise."""


def submit_sweep(sweep: str, overrides: list[str], address: str, wait: bool) -> int:
    """Submits jobs/sweep.py with the sweep and streams its log; returns the exit code of the job (0 at once without `wait`).

    A sweep file of the user's own travels with the job, with the preset folders beside it. Storage must be given as an
    absolute path. Raises BadInput where it is not, or where the address does not answer.
    """
    storage = next((o.split("=", 1)[1] for o in overrides if o.lstrip("+").startswith("storage=")), None)
    if storage is None or not (Path(storage).is_absolute() or is_remote(storage)):
        given = "missing" if storage is None else f"{storage!r} is relative"
        raise BadInput(
            [Fault("command line", "storage", f"{given}; a job's working directory is a temporary copy", "storage=/absolute/path")]
        )
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            [
                Fault(
                    "command line",
                    "--address",
                    f"{address} does not answer as a Ray dashboard: {reason}",
                    "the address printed by `ray start --head`",
                )
            ]
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        argument = _pack(sweep, Path(folder))
        entrypoint = shlex.join(["python", "jobs/sweep.py", argument, *overrides])
        environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    print(f"job {job}: {entrypoint}", flush=True)
    if not wait:
        return 0
    asyncio.run(_stream(client, job))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    print(f"job {job}: {info.status}: {info.message}", flush=True)
    return info.driver_exit_code or 1


async def _stream(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _pack(sweep: str, folder: Path) -> str:
    """Fills the working directory: the entry script, and the user's own sweep file with its presets. Returns SWEEP as the job sees it."""
    (folder / "jobs").mkdir()
    shutil.copyfile(job_script("sweep.py"), folder / "jobs" / "sweep.py")
    if not (sweep.endswith((".yaml", ".yml")) or "/" in sweep):
        return sweep
    path = Path(sweep).expanduser().resolve()
    target = folder / "sweep"
    target.mkdir()
    for sibling in path.parent.glob("*.y*ml"):
        shutil.copyfile(sibling, target / sibling.name)
    for group in ("model", "method", "data", "benchmark", "prompt", "deepspeed", "resources"):
        for root in (path.parent, path.parent.parent):
            if (root / group).is_dir():
                shutil.copytree(root / group, folder / group, dirs_exist_ok=True, ignore=_only_yaml)
    return f"sweep/{path.name}"


def _only_yaml(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".yaml", ".yml"))]
