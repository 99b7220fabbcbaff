"""Running the command line in a process of its own, as a user does."""

from __future__ import annotations

import os
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
