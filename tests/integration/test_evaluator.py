from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from jmedlora.config.benchmark import DEFAULT_METRICS, HARNESS_METRICS, BenchmarkConfig, PromptConfig
from jmedlora.config.faults import BadInput
from jmedlora.config.parts import Family, ModelConfig, Precision
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import render_prompt
from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.evaluation.journal import journal_progress
from jmedlora.evaluation.metrics import first_line_is_complete, score_response
from jmedlora.evaluation.opening import AdapterDoesNotFit
from jmedlora.evaluation.resident import AdapterHasNoEffect
from jmedlora.evaluation.results import SCORES, Checkpoint, write_results
from jmedlora.models.adapters import save_adapter
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.checksums import AdapterDamaged, adapter_digest
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import EvaluationSpec
from tests.tiny import tiny_model

PROMPT = PromptConfig(
    name="plain",
    template="{% for example in examples %}{{ example.instruction }}{{ example.output }}\n{% endfor %}"
    "{{ instruction }}\n{{ input }}\n答え：",
)
BENCHMARK = BenchmarkConfig.model_validate(
    {"name": "sample", "bundled": "sample/questions.jsonl", "fewshot_bundled": "sample/fewshot.jsonl", "filters": {"first": 6}}
)
RUN = "a" * 12
BASE = "b" * 12
ATTENTION: dict[Family, list[str]] = {"llama": ["q_proj", "k_proj", "v_proj"], "gpt_neox": ["query_key_value"]}
ALL_LINEAR: dict[Family, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def evaluation(shots: int = 0, **other: Any) -> EvaluationSpec:
    fields = {"evaluation_key": f"key-{shots}-{len(other)}", "benchmark": BENCHMARK, "benchmark_digest": "", "questions": 6}
    fields |= {"prompt_characters": 60.0, "shots": shots, "prompt": PROMPT, "max_new_tokens": 8, "batch_size": 4}
    return EvaluationSpec.model_validate(fields | other)


@dataclass
class Case:
    """A resident base model and storage to write into."""

    family: Family
    precision: Precision
    model: ModelConfig
    evaluator: Evaluator
    storage: Storage
    sources: Path

    def load_again(self) -> PreTrainedModel:
        return load_base(materialise(self.model, self.sources, True), self.precision, "fp32", True, "cpu")

    def write_adapter(self, step: int, scale: float, targets: list[str] | None = None, rank: int = 4) -> Path:
        """A checkpoint of the run whose B weights are random, `scale` times as large as a linear layer's start."""
        folder = self.storage.run(RUN).checkpoint(step)
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=targets or ATTENTION[self.family])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            adapted = get_peft_model(self.load_again(), config)
            for name, weight in adapted.named_parameters():
                if ".lora_B." in name:
                    weight.data.normal_(0, scale / math.sqrt(weight.shape[1]))
        save_adapter(folder, {key: weight.detach() for key, weight in get_peft_model_state_dict(adapted).items()}, config, self.model.name)
        return folder

    def metrics(self, step: int, spec: EvaluationSpec, run_key: str = RUN) -> dict[str, Any]:
        return json.loads((self.storage.run(run_key).evaluation(spec.folder, step) / METRICS).read_text(encoding="utf-8"))

    def predictions(self, step: int, spec: EvaluationSpec, run_key: str = RUN) -> list[dict[str, Any]]:
        file = self.storage.run(run_key).evaluation(spec.folder, step) / PREDICTIONS
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def texts(self, step: int, spec: EvaluationSpec, run_key: str = RUN) -> list[str]:
        return [row["prediction"] for row in self.predictions(step, spec, run_key)]


CASES: list[tuple[Family, Precision]] = [("llama", "fp32"), ("gpt_neox", "fp32"), ("llama", "nf4"), ("gpt_neox", "nf4")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family, precision = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        model = tiny_model(family)
        evaluator = Evaluator(model, precision, "fp32", True, tmp_path, True, "cpu")
        yield Case(family, precision, model, evaluator, Storage(tmp_path / "results"), tmp_path)


def one_family(*families: tuple[Family, Precision]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", families, indirect=True, ids=lambda case: "-".join(case))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(2, 42)[None]).logits


def adapted_logits(case: Case, adapter: int = 0) -> torch.Tensor:
    """Those of the resident adapter at this place, for the same row."""
    case.evaluator._resident.enter([adapter])
    return logits(case.evaluator._base)


def greedy_texts(case: Case, model: nn.Module, spec: EvaluationSpec) -> list[str]:
    """Whole forward passes for each prompt alone, cut where generation stops."""
    tokenizer = load_tokenizer(materialise(case.model, case.sources, True))
    benchmark = load_benchmark(spec.benchmark, case.sources)
    texts = []
    for question in benchmark.questions:
        examples = [example.as_instruction() for example in benchmark.examples[: spec.shots]]
        prompt = render_prompt(spec.prompt, question.as_instruction(), examples)
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        ids, start = ids[-256 + spec.max_new_tokens :], min(len(ids), 256 - spec.max_new_tokens)
        for _ in range(spec.max_new_tokens):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id or first_line_is_complete(tokenizer.decode(ids[start:])):
                break
        texts.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return texts


def test_scores_of_an_adapter_are_those_of_the_adapter(case: Case) -> None:
    folder, spec = case.write_adapter(100, 6.0), evaluation(max_new_tokens=4)
    metrics = case.evaluator.evaluate(RUN, 100, spec, case.storage)
    expected = greedy_texts(case, PeftModel.from_pretrained(case.load_again(), folder).eval(), spec)
    assert case.texts(100, spec) == expected
    bare = greedy_texts(case, case.load_again(), spec)
    assert case.texts(100, spec) != bare
    case.evaluator.evaluate(BASE, 0, spec, case.storage)
    assert case.texts(0, spec, BASE) == bare
    assert metrics["adapter_digest"] == adapter_digest(folder)
    assert case.metrics(0, spec, BASE)["adapter_digest"] is None


def test_the_base_is_the_same_before_between_and_after_adapters(case: Case) -> None:
    base = case.evaluator._base
    modules = dict(base.named_modules())
    weights = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    fresh = logits(case.load_again())
    assert torch.equal(logits(base), fresh)
    spec = evaluation()
    case.evaluator.evaluate(BASE, 0, spec, case.storage)
    first = case.texts(0, spec, BASE)
    case.write_adapter(100, 6.0)
    case.write_adapter(200, 6.0, ALL_LINEAR[case.family], rank=2)
    adapted = []
    for step in (100, 200, 100):
        case.evaluator.evaluate(RUN, step, spec, case.storage)
        adapted.append((adapted_logits(case), case.texts(step, spec)))
        assert not torch.equal(adapted[-1][0], fresh)
        case.evaluator.evaluate(BASE, 0, spec, case.storage)
        assert case.texts(0, spec, BASE) == first
        assert torch.equal(logits(base), fresh)
    assert torch.equal(adapted[0][0], adapted[2][0])
    assert adapted[0][1] == adapted[2][1]
    assert not torch.equal(adapted[0][0], adapted[1][0])
    after = dict(base.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules), "nothing of PEFT is left in the base"
    assert all(torch.equal(weight.view(torch.uint8), weights[name].view(torch.uint8)) for name, weight in base.named_parameters())


def test_one_adapter_follows_another_without_the_base_between(case: Case) -> None:
    spec = evaluation()
    one, two = case.write_adapter(100, 6.0), case.write_adapter(200, 6.0, rank=2)
    case.evaluator.evaluate(RUN, 100, spec, case.storage)
    case.evaluator.evaluate(RUN, 200, spec, case.storage)
    torch.testing.assert_close(adapted_logits(case), logits(PeftModel.from_pretrained(case.load_again(), two).eval()))
    case.evaluator.evaluate(RUN, 100, spec, case.storage)
    torch.testing.assert_close(adapted_logits(case), logits(PeftModel.from_pretrained(case.load_again(), one).eval()))


@one_family(("llama", "fp32"), ("gpt_neox", "nf4"))
def test_evaluations_of_one_checkpoint_load_it_once(case: Case) -> None:
    case.write_adapter(100, 6.0)
    case.evaluator.evaluate(RUN, 100, evaluation(), case.storage)
    pack = case.evaluator._resident.pack
    case.evaluator.evaluate(RUN, 100, evaluation(1), case.storage)
    assert pack is not None
    assert case.evaluator._resident.pack is pack
    assert case.texts(100, evaluation()) != case.texts(100, evaluation(1))


@one_family(("llama", "fp32"), ("gpt_neox", "fp32"), ("llama", "nf4"))
def test_an_adapter_without_effect_is_refused(case: Case) -> None:
    case.write_adapter(100, 0.0)
    spec, fresh = evaluation(), logits(case.evaluator._base)
    with pytest.raises(AdapterHasNoEffect, match="step-000100"):
        case.evaluator.evaluate(RUN, 100, spec, case.storage)
    assert not case.storage.run(RUN).is_evaluated(spec.folder, 100)
    assert torch.equal(logits(case.evaluator._base), fresh)
    case.write_adapter(200, 6.0)
    assert case.evaluator.evaluate(RUN, 200, spec, case.storage)["n"] == 6


@one_family(("llama", "fp32"))
@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_a_flipped_byte_is_refused(case: Case, name: str) -> None:
    file = case.write_adapter(100, 6.0) / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterDamaged, match=name):
        case.evaluator.evaluate(RUN, 100, evaluation(), case.storage)
    assert not case.storage.run(RUN).evaluation(evaluation().folder, 100).exists()


@one_family(("llama", "fp32"))
def test_a_checkpoint_damaged_after_it_was_loaded_is_refused(case: Case) -> None:
    folder = case.write_adapter(100, 6.0)
    case.evaluator.evaluate(RUN, 100, evaluation(), case.storage)
    (folder / CHECKSUMS).unlink()
    with pytest.raises(AdapterDamaged, match="missing"):
        case.evaluator.evaluate(RUN, 100, evaluation(1), case.storage)


@one_family(("llama", "fp32"), ("gpt_neox", "nf4"))
def test_an_adapter_for_other_layers_or_shapes_is_refused_and_leaves_the_base_clean(case: Case) -> None:
    fresh = logits(case.evaluator._base)
    folder = case.write_adapter(100, 6.0)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    dropped = sorted(weights)[0]
    wider = {key: torch.cat([weight, weight], dim=1) if key == dropped else weight for key, weight in weights.items()}
    renamed = {key.replace(".layers.1.", ".layers.7."): weight for key, weight in weights.items()}
    config = LoraConfig.from_pretrained(folder)
    for step, changed in ((200, {k: v for k, v in weights.items() if k != dropped}), (300, renamed), (400, wider)):
        save_adapter(case.storage.run(RUN).checkpoint(step), changed, config, case.model.name)
        with pytest.raises(AdapterDoesNotFit):
            case.evaluator.evaluate(RUN, step, evaluation(), case.storage)
        assert torch.equal(logits(case.evaluator._base), fresh)
    assert case.evaluator.evaluate(RUN, 100, evaluation(), case.storage)["n"] == 6


@one_family(("llama", "fp32"))
def test_what_is_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmedlora.evaluation.results.now", lambda: 1_700_000_000.5)
    folder, spec, progress = case.write_adapter(100, 6.0), evaluation(2, max_new_tokens=20), []
    metrics = case.evaluator.evaluate(RUN, 100, spec, case.storage, lambda done, total: progress.append((done, total)))
    assert progress == [(4, 6), (6, 6)]
    assert case.metrics(100, spec) == metrics
    assert sorted(path.name for path in case.storage.run(RUN).evaluation(spec.folder, 100).iterdir()) == [METRICS, PREDICTIONS]
    rows = case.predictions(100, spec)
    questions = load_benchmark(BENCHMARK, case.sources).questions
    for row, question in zip(rows, questions, strict=True):
        score = score_response(row["prediction"], question)
        assert row == {
            "problem_id": question.problem_id,
            "question": question.text,
            "prediction": row["prediction"],
            "response": score.response,
            "answer": question.answer,
            "choices": list(question.choices),
            "chosen": ["abcde"[i] for i in score.chosen],
            "gold": ["abcde"[i] for i in question.gold],
            "correct": score.correct,
            "exact_match": score.exact_match,
            "gestalt_score": score.gestalt_score,
        }
    tokenizer = load_tokenizer(materialise(case.model, case.sources, True))
    examples = [example.as_instruction() for example in load_benchmark(BENCHMARK, case.sources).examples[:2]]
    lengths = [len(tokenizer(render_prompt(PROMPT, question.as_instruction(), examples)).input_ids) for question in questions]
    assert metrics == {
        "run_key": RUN,
        "step": 100,
        "evaluation_key": spec.evaluation_key,
        "benchmark": "sample",
        "shots": 2,
        "prompt": "plain",
        "n": 6,
        "accuracy": sum(row["correct"] for row in rows) / 6,
        "exact_match": sum(row["exact_match"] for row in rows) / 6,
        "gestalt_score": math.fsum(row["gestalt_score"] for row in rows) / 6,
        **{key: metrics[key] for score in SCORES for key in (f"{score}_low", f"{score}_high")},
        "empty_answers": sum(row["response"] == "" for row in rows),
        "no_resemblance": sum(not set(row["response"]) & set("".join(row["choices"])) for row in rows),
        "metric_settings": DEFAULT_METRICS.model_dump(mode="json"),
        "exam_rules": None,
        "scoring": "generate",
        "adapter_digest": adapter_digest(folder),
        "prompt_tokens": sum(min(length, 236) for length in lengths),
        "new_tokens": metrics["new_tokens"],
        "truncated_prompts": sum(length > 236 for length in lengths),
        "batch_size": 4,
        "pack": 1,
        "seconds": metrics["seconds"],
        "time": 1_700_000_000.5,
        "engine": "transformers",
        "device": "cpu",
    }
    assert all(0 <= metrics[f"{score}_low"] <= metrics[score] <= metrics[f"{score}_high"] <= 1 for score in SCORES)
    assert 0 < metrics["truncated_prompts"] < 6, "the benchmark no longer reaches the model's limit"
    assert 0 < metrics["new_tokens"] <= 6 * 20
    assert metrics["seconds"] > 0


@one_family(("llama", "fp32"))
def test_metric_settings_change_scores_and_not_predictions(case: Case) -> None:
    spec = evaluation()
    case.evaluator.evaluate(BASE, 0, spec, case.storage)
    plain = case.texts(0, spec, BASE)
    metrics = case.evaluator.evaluate(BASE, 0, spec.model_copy(update={"metrics": HARNESS_METRICS}), case.storage)
    assert metrics["metric_settings"]["order"] == "mean"
    assert case.texts(0, spec, BASE) == plain


@one_family(("llama", "fp32"))
def test_too_few_examples_are_bad_input(case: Case) -> None:
    with pytest.raises(BadInput, match="4 asks for more examples than the 3 there are; allowed: 0 to 3"):
        case.evaluator.evaluate(BASE, 0, evaluation(4), case.storage)
    assert not case.storage.root.exists()


@one_family(("llama", "fp32"), ("gpt_neox", "nf4"))
def test_results_do_not_depend_on_batch_size_or_global_random_state(case: Case) -> None:
    case.write_adapter(100, 6.0)
    spec = evaluation()
    case.evaluator.evaluate(RUN, 100, spec, case.storage)
    first = case.predictions(100, spec)
    state = torch.random.get_rng_state()
    other = spec.model_copy(update={"batch_size": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Evaluator(case.model, case.precision, "fp32", True, case.sources, True, "cpu").evaluate(RUN, 100, other, case.storage)
    assert case.predictions(100, spec) == first
    assert torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- several adapters at once

STEPS = (100, 200, 300, 400, 500)


def write_mixed(case: Case) -> list[Checkpoint]:
    """Adapters of several ranks, layers and scales."""
    for step, rank in zip(STEPS, (4, 1, 8, 2, 4), strict=True):
        case.write_adapter(step, 6.0, None if step % 200 else ALL_LINEAR[case.family], rank)
    return [Checkpoint(RUN, step) for step in STEPS]


def score_together(case: Case, checkpoints: list[Checkpoint], spec: EvaluationSpec, pack: int, root: Path | None = None) -> list[Any]:
    storage = case.storage if root is None else Storage(root)
    if root is not None:
        shutil.copytree(case.storage.run(RUN).checkpoints, storage.run(RUN).checkpoints)
    return case.evaluator.evaluate_together(checkpoints, spec, storage, pack)


@pytest.mark.parametrize("scoring", ["generate", "loglikelihood"])
def test_adapters_answer_together_as_one_by_one(case: Case, tmp_path: Path, scoring: str) -> None:
    checkpoints, spec = write_mixed(case), evaluation(1, scoring=scoring, batch_size=4 if scoring == "generate" else 10)
    alone = Case(case.family, case.precision, case.model, case.evaluator, Storage(tmp_path / "alone"), case.sources)
    apart = score_together(case, checkpoints, spec, 1, tmp_path / "alone")
    for pack in (2, 5):
        several = Case(case.family, case.precision, case.model, case.evaluator, Storage(tmp_path / f"pack-{pack}"), case.sources)
        together = score_together(case, checkpoints, spec, pack, tmp_path / f"pack-{pack}")
        for checkpoint, one, other in zip(checkpoints, apart, together, strict=True):
            rows, again = alone.predictions(checkpoint.step, spec), several.predictions(checkpoint.step, spec)
            for row, same in zip(rows, again, strict=True):
                assert same.pop("loglikelihoods", []) == pytest.approx(row.get("loglikelihoods", []), abs=1e-4)
                assert same == {key: value for key, value in row.items() if key != "loglikelihoods"}
            for key in ("adapter_digest", "accuracy", "gestalt_score", "prompt_tokens", "new_tokens", "batch_size"):
                assert other[key] == one[key]
        assert [metrics["pack"] for metrics in together] == ([2, 2, 2, 2, 1] if pack == 2 else [5] * 5)
    assert len({tuple(row["response"] for row in alone.predictions(step, spec)) for step in STEPS}) > 1


@one_family(("llama", "fp32"), ("gpt_neox", "nf4"))
def test_layers_of_a_pack_are_those_that_peft_makes(case: Case) -> None:
    checkpoints = write_mixed(case)
    patterned = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=ATTENTION[case.family], use_rslora=True, layers_to_transform=[1],
        rank_pattern={".*1.*": 2}, alpha_pattern={".*1.*": 6},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        adapted = get_peft_model(case.load_again(), patterned)
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.data.normal_(0, 3)
    weights = {key: weight.detach() for key, weight in get_peft_model_state_dict(adapted).items()}
    save_adapter(case.storage.run(RUN).checkpoint(600), weights, patterned, case.model.name)
    folders = [case.storage.run(RUN).checkpoint(step) for step in (*STEPS, 600)]
    resident = case.evaluator._resident
    assert resident.load(folders, [2, 3, 4]) == [adapter_digest(folder) for folder in folders]
    assert len(checkpoints) + 1 == len(resident)
    for number, folder in enumerate(folders):
        expected = logits(PeftModel.from_pretrained(case.load_again(), folder).eval())
        torch.testing.assert_close(adapted_logits(case, number), expected, rtol=1e-4, atol=1e-4)


@one_family(("llama", "fp32"))
def test_what_is_wrong_with_one_stops_no_other(case: Case, tmp_path: Path) -> None:
    checkpoints, spec = write_mixed(case), evaluation()
    damaged, without_effect, other, good, also_good = checkpoints
    expected = score_together(case, [good, also_good], spec, 1, tmp_path / "alone")
    (case.storage.run(RUN).checkpoint(damaged.step) / ADAPTER_WEIGHTS).write_bytes(b"x")
    shutil.rmtree(case.storage.run(RUN).checkpoint(without_effect.step))
    case.write_adapter(without_effect.step, 0.0)
    folder = case.storage.run(RUN).checkpoint(other.step)
    config, weights = LoraConfig.from_pretrained(folder), load_file(folder / ADAPTER_WEIGHTS)
    shutil.rmtree(folder)
    save_adapter(folder, dict(list(weights.items())[1:]), config, case.model.name)
    outcomes = score_together(case, checkpoints, spec, 8)
    assert [type(outcome) for outcome in outcomes] == [AdapterDamaged, AdapterHasNoEffect, AdapterDoesNotFit, dict, dict]
    assert [outcome["accuracy"] for outcome in outcomes[3:]] == [metrics["accuracy"] for metrics in expected]
    assert [outcome["pack"] for outcome in outcomes[3:]] == [2, 2]
    assert sorted(path.name for path in case.storage.run(RUN).evaluation(spec.folder, 0).parent.iterdir()) == ["step-000400", "step-000500"]


@one_family(("llama", "fp32"))
def test_an_adapter_that_is_more_than_low_rank_layers_is_refused(case: Case) -> None:
    folder = case.write_adapter(100, 6.0)
    config, weights = LoraConfig.from_pretrained(folder), load_file(folder / ADAPTER_WEIGHTS)
    config.use_dora = True
    save_adapter(case.storage.run(RUN).checkpoint(200), weights, config, case.model.name)
    with pytest.raises(AdapterDoesNotFit, match="use_dora: only low-rank layers"):
        case.evaluator.evaluate(RUN, 200, evaluation(), case.storage)


@one_family(("llama", "fp32"))
def test_a_base_is_evaluated_by_itself_among_others(case: Case) -> None:
    checkpoints, spec = write_mixed(case), evaluation()
    told: list[tuple[int, int]] = []
    mixed = [checkpoints[0], Checkpoint(BASE, 0), checkpoints[1]]
    outcomes = case.evaluator.evaluate_together(mixed, spec, case.storage, 8, lambda *numbers: told.append(numbers))
    assert [outcome["pack"] for outcome in outcomes] == [2, 1, 2]  # type: ignore[index]
    assert [outcome["adapter_digest"] is None for outcome in outcomes] == [False, True, False]  # type: ignore[index]
    assert told == [(4, 18), (6, 18), (14, 18), (18, 18)]


@one_family(("llama", "fp32"))
def test_a_full_disk_for_one_leaves_its_answers_and_stops_no_other(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, spec = write_mixed(case)[:2], evaluation()

    def full(storage: Storage, run_key: str, step: int, *rest: Any) -> dict[str, Any]:
        if step == 100:
            raise OSError(28, "No space left on device")
        return write_results(storage, run_key, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("jmedlora.evaluation.journal.WRITE_EVERY_S", 0)
        patch.setattr("jmedlora.evaluation.evaluator.write_results", full)
        refused, done = score_together(case, checkpoints, spec, 8)
    assert isinstance(refused, OSError) and done["step"] == 200
    assert journal_progress(case.storage, RUN, 100, spec) == 6
    assert journal_progress(case.storage, RUN, 200, spec) == 0
    [metrics] = score_together(case, checkpoints[:1], spec, 8)
    assert metrics["n"] == 6
