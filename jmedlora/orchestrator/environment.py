"""Where Ray puts the processes of a sweep, and their environment variables."""

from __future__ import annotations

import os

from jmedlora.config.parts import ResourcesConfig

ON_HEAD = {"node:__internal_head__": 0.0001}
"""A resource that the head node of every Ray cluster has: keeps small processes there, where nothing is taken away."""


def worker_environment(resources: ResourcesConfig, threads: int, offline: bool) -> dict[str, str]:
    """For training workers and evaluation actors; never holds a secret."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if not resources.gpus_per_worker:
        variables["DS_ACCELERATOR"] = "cpu"
    if offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for name in ("JMEDLORA_CACHE", "HF_HOME"):
        if name in os.environ:
            variables[name] = os.environ[name]
    return variables
