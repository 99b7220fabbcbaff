"""Resources that a killed controller of a worker group leaves reserved, on a Ray of the test's own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group

from jmedlora.orchestrator.places import free_abandoned_places

WITHIN_S = 20.0


@pytest.fixture
def own_ray() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, num_cpus=3, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Controller:
    def reserve(self) -> int:
        ray.get(placement_group([{"CPU": 1}]).ready())
        return os.getpid()


@ray.remote(num_cpus=0)
def free() -> None:
    free_abandoned_places()


def free_cores() -> float:
    return float(ray.available_resources().get("CPU", 0))


def free_until(cores: float) -> None:
    """As a trial does it that begins again, until the cluster has heard of the death."""
    deadline = time.monotonic() + WITHIN_S
    while free_cores() != cores:
        assert time.monotonic() < deadline, f"{free_cores()} cores are free"
        ray.get(free.remote())
        time.sleep(0.2)


def test_what_a_killed_controller_had_reserved_is_given_back_and_nothing_else(own_ray: None) -> None:
    ray.get(placement_group([{"CPU": 1}]).ready())  # the driver's own
    controllers: list[Any] = [Controller.remote(), Controller.remote()]  # type: ignore[attr-defined]
    pids = [ray.get(controller.reserve.remote()) for controller in controllers]
    ray.get(free.remote())
    time.sleep(1.0)
    assert free_cores() == 0
    os.kill(pids[0], signal.SIGKILL)
    free_until(cores=1)
    ray.get(free.remote())
    time.sleep(1.0)
    assert free_cores() == 1, "the other controller lives"
