"""Joining a Ray cluster, or starting a Ray of one's own, and what only the cluster can tell."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.sweep import SweepConfig
from jmedlora.orchestrator.address import refused


@contextmanager
def joined_ray(config: SweepConfig, address: str | None, given: str | None) -> Iterator[None]:
    """Joins or starts Ray, and leaves it; SIGTERM meanwhile interrupts. Inside a process that has joined already, nothing is done."""
    if ray.is_initialized():
        yield
        return
    resources = config.resources
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interruption is ours to handle: Tune would go on to its own end
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with verbose=0, this one is silent
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # their causes are told at the end, a line each
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    previous = signal.getsignal(signal.SIGTERM)
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "jmedlora"}
    try:
        try:
            if address:
                ray.init(address=address, **common)
            else:
                # nobody takes this machine away, and each trial has a process less to start
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                needed = resources.workers_per_trial * resources.cpus_per_worker + resources.evaluation.actors * resources.evaluation.cpus
                ray.init(address="local", include_dashboard=False, num_cpus=max(os.cpu_count() or 1, needed), **common)
        except SystemExit:  # how Ray answers SIGTERM while it starts
            raise KeyboardInterrupt from None
        except (ValueError, ConnectionError) as error:
            if not address:
                raise
            raise refused(given, address, first_line(error)) from None
        # after Ray, which puts a handler of its own there
        signal.signal(signal.SIGTERM, previous if callable(previous) else signal.default_int_handler)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, previous)


def check_cluster(config: SweepConfig, address: str | None) -> None:
    """What only the cluster itself can tell; raises BadInput before anything is written."""
    faults = []
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and not os.environ.get("MLFLOW_TRACKING_URI"):
        faults.append(
            Fault(
                "environment",
                "MLFLOW_TRACKING_URI",
                f"not set, and the cluster has {nodes} nodes",
                "the address of an MLflow server: a sqlite file cannot be shared",
            )
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))
    needed = config.resources.workers_per_trial * config.resources.gpus_per_worker
    if nodes == 1 and needed > gpus and not address:
        faults.append(
            Fault(
                config.file,
                "resources.gpus_per_worker",
                f"a trial needs {needed} GPUs, this machine has {gpus}",
                f"at most {gpus}, or the address of a cluster",
            )
        )
    if faults:
        raise BadInput(faults)
