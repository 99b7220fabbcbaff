"""On a GPU: losses, scores and answers of the CPU; a resumed run ends as an undisturbed one. The rest: `tests.bench.gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jmedlora.models.dropout import Chances, KeyedDropout, RowsOfAdapter
from tests.bench import gpu_checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LARGEST = {"fp32": 1e-4, "bf16": 0.02}
"""Relative difference of a step's loss, by compute format."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def on_the_cpu(work: Path) -> dict[str, Any]:
    gpu_checks.specs_of(work)
    return gpu_checks.on_the_cpu(work)


def test_training_follows_the_cpus(work: Path, on_the_cpu: dict[str, Any]) -> None:
    for name, spec in gpu_checks.specs_of(work).items():
        found = gpu_checks.compare_training(work, name, spec, on_the_cpu["losses"][name])
        assert found["largest"] < LARGEST[spec.compute_precision], found


def test_masks_made_in_one_pass_are_those_of_the_cpu() -> None:
    chances = [Chances(seed, probability) for seed, probability in ((0, 0.1), (3, 0.5), (4, 0.0))]
    rows = [RowsOfAdapter([4, 9], 1), RowsOfAdapter([5], 7), RowsOfAdapter([1], 2)]
    found = {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        dropout = KeyedDropout(chances, ["first", "second"], device)
        dropout.enter(rows)
        values = torch.linspace(-1, 1, 4 * 33 * 130, device=device).view(4, 33, 130).to(torch.bfloat16)
        found[device.type] = [dropout.masks(layer, 33, 130, values.dtype).apply(values).cpu() for layer in (0, 1)]
    assert all(torch.equal(*pair) for pair in zip(found["cpu"], found["cuda"], strict=True))


def test_a_resumed_run_ends_as_an_undisturbed_one(work: Path) -> None:
    for name, spec in gpu_checks.specs_of(work).items():
        found = gpu_checks.compare_resumed(work, name, spec)
        assert found["largest_difference"] < 1e-6, found


@pytest.mark.parametrize("family", gpu_checks.FAMILIES)
def test_scores_are_the_cpus(family: str, on_the_cpu: dict[str, Any]) -> None:
    found = gpu_checks.compare_scores(family, on_the_cpu["scores"][family], "cuda")
    assert found["batched_as_singly"] == found["as_on_the_cpu"] == found["answers"]
    assert found["likelihoods_apart"] < 1e-3
