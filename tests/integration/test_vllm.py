"""Evaluation through vLLM gives what evaluation through transformers gives; vLLM itself is stood in for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.faults import BadInput
from jmedlora.config.parts import EvaluationResources, ModelConfig, PathSource
from jmedlora.evaluation import journal, vllm_engine, vllm_requests
from jmedlora.evaluation.evaluator import CheckpointEvaluator, Evaluator
from jmedlora.evaluation.journal import journal_progress
from jmedlora.evaluation.making import make_evaluator
from jmedlora.evaluation.opening import AdapterDoesNotFit
from jmedlora.evaluation.resident import AdapterHasNoEffect
from jmedlora.evaluation.results import Checkpoint
from jmedlora.evaluation.vllm_evaluator import VllmEvaluator
from jmedlora.models.adapters import save_adapter
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.orchestrator.errors import Refused
from jmedlora.orchestrator.evaluation_pool import EvaluationActor
from jmedlora.plan.checksums import AdapterDamaged
from jmedlora.plan.layout import ADAPTER_WEIGHTS, METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec
from tests import vllm_standin
from tests.integration.test_evaluator import ALL_LINEAR, ATTENTION, BASE, RUN, Case, evaluation
from tests.tiny import tiny_model
from tests.vllm_standin import Seen

EVERY_STEP = (100, 200, 300, 400)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A model that breaks lines now and then, also at the beginning of an answer, four adapters, and transformers' evaluator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield prepare(tmp_path_factory.mktemp("vllm"), {})


def prepare(folder: Path, sizes: dict[str, int]) -> Case:
    tiny = tiny_model("llama")
    assert tiny.architecture is not None
    roomy = tiny.model_copy(update={"architecture": tiny.architecture.model_copy(update={"max_positions": 2048, **sizes})})
    weights = folder / "tiny"
    shutil.copytree(materialise(roomy, folder, True), weights)
    [line_break] = load_tokenizer(weights)("\n", add_special_tokens=False).input_ids
    tensors = load_file(weights / "model.safetensors")
    tensors["model.embed_tokens.weight"][line_break] *= 2.5
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    model = roomy.model_copy(update={"source": PathSource(kind="path", path=str(weights))})
    case = Case("llama", "fp32", model, Evaluator(model, "fp32", "fp32", True, folder, True, "cpu"), Storage(folder / "first"), folder)
    case.write_adapter(100, 6.0)
    case.write_adapter(200, 6.0, ALL_LINEAR["llama"], rank=12)
    case.write_adapter(300, 6.0, ["q_proj", "down_proj"], rank=1)
    write_patterned(case, 400)
    return case


def write_patterned(case: Case, step: int) -> None:
    """An adapter whose layers have ranks and scales of their own."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=ATTENTION["llama"],
        rank_pattern={"q_proj": 9, "layers.1.self_attn.v_proj": 2},
        alpha_pattern={"k_proj": 24},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        adapted = get_peft_model(case.load_again(), config)
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.data.normal_(0, 3.0)
    tensors = {key: weight.detach() for key, weight in get_peft_model_state_dict(adapted).items()}
    save_adapter(case.storage.run(RUN).checkpoint(step), tensors, config, case.model.name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """vLLM is stood in for; whatever is answered is written at once."""
    monkeypatch.setattr(journal, "WRITE_EVERY_S", 0)
    return vllm_standin.install(monkeypatch)


@pytest.fixture
def there(prepared: Case, tmp_path: Path) -> Case:
    """Transformers' evaluator, with storage of its own."""
    return elsewhere(prepared, prepared.evaluator, tmp_path / "transformers")


@pytest.fixture
def here(prepared: Case, tmp_path: Path, seen: Seen) -> Case:
    """vLLM's evaluator, with storage of its own."""
    evaluator = VllmEvaluator(prepared.model, "fp32", "fp32", True, prepared.sources, True, adapters_at_once=4)
    return elsewhere(prepared, evaluator, tmp_path / "vllm")


def elsewhere(case: Case, evaluator: CheckpointEvaluator, root: Path) -> Case:
    storage = Storage(root)
    shutil.copytree(case.storage.run(RUN).checkpoints, storage.run(RUN).checkpoints)
    return Case(case.family, case.precision, case.model, evaluator, storage, case.sources)  # type: ignore[arg-type]


def asked(shots: int = 0, **other: Any) -> EvaluationSpec:
    prompt = other["prompt"].name if "prompt" in other else ""
    return evaluation(shots, max_new_tokens=NEW_TOKENS, evaluation_key=f"{shots}-{other.get('scoring')}-{prompt}", **other)


def together(case: Case, spec: EvaluationSpec, steps: tuple[int, ...] = EVERY_STEP, pack: int = 4, **other: Any) -> list[Any]:
    return case.evaluator.evaluate_together([Checkpoint(RUN, step) for step in steps], spec, case.storage, pack, **other)


def predictions(case: Case, spec: EvaluationSpec, step: int, run_key: str = RUN) -> str:
    return (case.storage.run(run_key).evaluation(spec.folder, step) / PREDICTIONS).read_text(encoding="utf-8")


@pytest.mark.parametrize("shots", [0, 1])
def test_answers_are_those_of_transformers(here: Case, there: Case, seen: Seen, shots: int) -> None:
    spec = asked(shots)
    for case in (here, there):
        assert all(isinstance(outcome, dict) for outcome in together(case, spec))
        case.evaluator.evaluate(BASE, 0, spec, case.storage)
    for step in EVERY_STEP:
        assert predictions(here, spec, step) == predictions(there, spec, step)
        ours, theirs = here.metrics(step, spec), there.metrics(step, spec)
        assert (ours["engine"], theirs["engine"]) == ("vllm", "transformers")
        differing = {"engine", "seconds", "time"}
        assert {key: ours[key] for key in ours.keys() - differing} == {key: theirs[key] for key in theirs.keys() - differing}
    assert predictions(here, spec, 0, BASE) == predictions(there, spec, 0, BASE)
    texts = [text for step in EVERY_STEP for text in here.texts(step, spec)]
    assert any(text.startswith("\n") and text.strip() for text in texts), "the rule of vLLM alone would have ended these at once"
    assert any(text.endswith("\n") and text.strip() for text in texts), "and no rule would have let these go on"
    assert len({here.texts(step, spec)[0] for step in EVERY_STEP}) > 1


def test_answers_behind_a_marker(here: Case, there: Case) -> None:
    """The first line break is not the end there."""
    prompt = PromptConfig(name="marked", template="{{ instruction }}\n{{ input }}", answer_marker="Q")
    spec = asked(prompt=prompt)
    for case in (here, there):
        together(case, spec, (100, 200))
    assert [predictions(here, spec, step) for step in (100, 200)] == [predictions(there, spec, step) for step in (100, 200)]


@pytest.mark.parametrize("shots", [0, 1])
def test_likelihoods_are_those_of_transformers(here: Case, there: Case, shots: int) -> None:
    spec = asked(shots, scoring="loglikelihood")
    for case in (here, there):
        together(case, spec)
        case.evaluator.evaluate(BASE, 0, spec, case.storage)
    for step, run_key in [*((step, RUN) for step in EVERY_STEP), (0, BASE)]:
        ours, theirs = (case.predictions(step, spec, run_key) for case in (here, there))
        for own, other in zip(ours, theirs, strict=True):
            assert own["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
            assert own["choice_tokens"] == other["choice_tokens"]
    assert here.metrics(100, spec)["new_tokens"] == there.metrics(100, spec)["new_tokens"]


def test_a_prompt_that_fills_all_positions_leaves_room_for_what_vllm_adds(prepared: Case, tmp_path: Path, seen: Seen) -> None:
    tiny = tiny_model("llama")
    assert tiny.architecture is not None
    short = tiny.model_copy(update={"architecture": tiny.architecture.model_copy(update={"max_positions": 128})})
    evaluator = VllmEvaluator(short, "fp32", "fp32", True, prepared.sources, True)
    case = elsewhere(prepared, evaluator, tmp_path / "short")
    metrics = case.evaluator.evaluate(RUN, 100, asked(1, scoring="loglikelihood"), case.storage)
    assert metrics["truncated_prompts"] > 0
    assert max(len(ids) for ids, *_ in seen.asked) == 127
    assert case.evaluator.evaluate(RUN, 100, asked(1), case.storage)["truncated_prompts"] > 0


class Interrupted(BaseException):
    pass


def interrupt(case: Case, spec: EvaluationSpec, answers: int) -> None:
    def on_progress(done: int, total: int) -> None:
        if done >= answers:
            raise Interrupted

    with pytest.raises(Interrupted):
        together(case, spec, (100, 200), on_progress=on_progress)


@pytest.mark.parametrize("scoring", ["generate", "loglikelihood"])
def test_goes_on_from_a_journal(here: Case, there: Case, seen: Seen, monkeypatch: pytest.MonkeyPatch, scoring: str) -> None:
    spec = asked(1, scoring=scoring)
    monkeypatch.setattr(vllm_requests, "AT_ONCE", 2 if scoring == "generate" else 10)
    interrupt(here, spec, 8)
    assert [journal_progress(here.storage, RUN, step, spec) for step in (100, 200)] == [6, 2]
    seen.asked.clear()
    told: list[tuple[int, int]] = []
    together(here, spec, (100, 200), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 12), (10, 12), (12, 12)]
    assert {request.lora_name for *_, request in seen.asked if request} == {here.metrics(200, spec)["adapter_digest"]}
    together(there, spec, (100, 200))
    for ours, theirs in zip(here.predictions(100, spec), there.predictions(100, spec), strict=True):
        assert ours["prediction"] == theirs["prediction"]
        assert ours.get("loglikelihoods", []) == pytest.approx(theirs.get("loglikelihoods", []), abs=1e-4)


def test_answers_of_the_other_engine_are_not_continued(here: Case, there: Case, seen: Seen) -> None:
    spec = asked(1, batch_size=2)
    interrupt(there, spec, 4)
    assert journal_progress(there.storage, RUN, 100, spec) > 0
    there.evaluator = here.evaluator  # type: ignore[assignment]
    together(there, spec, (100, 200))
    first = [ids for ids, params, request in seen.asked if request is not None and params.stop]
    assert len(first) == 12, "every question of both"


def test_what_is_wrong_with_one_adapter_stops_no_other(here: Case, there: Case, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vllm_standin.LORA_LAYERS, "LlamaForCausalLM", {"q_proj", "k_proj", "v_proj", "down_proj"})
    file = here.storage.run(RUN).checkpoint(100) / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    here.write_adapter(500, 0.0)
    here.write_adapter(600, 6.0, ["o_proj"])
    here.write_adapter(700, 6.0, rank=513)
    shutil.rmtree(here.storage.run(RUN).checkpoint(400))
    here.storage.run(RUN).checkpoint(400).mkdir()
    folder = here.write_adapter(800, 6.0, ["q_proj", "lm_head"])
    config, tensors = LoraConfig.from_pretrained(folder), load_file(folder / ADAPTER_WEIGHTS)
    shutil.rmtree(folder)
    save_adapter(folder, {name: tensor for name, tensor in tensors.items() if ".lora_" in name}, config, here.model.name)
    spec, steps = asked(), (100, 300, 400, 500, 600, 700, 800)
    outcomes = dict(zip(steps, together(here, spec, steps, pack=8), strict=True))
    together(there, spec, (300,))
    assert predictions(here, spec, 300) == predictions(there, spec, 300)
    assert {step: type(outcome) for step, outcome in outcomes.items()} == {
        100: AdapterDamaged,
        300: dict,
        400: AdapterDamaged,
        500: AdapterHasNoEffect,
        600: AdapterDoesNotFit,
        700: AdapterDoesNotFit,
        800: AdapterDoesNotFit,
    }
    assert "received ['o_proj']. Please verify that the loaded LoRA module is correct" in str(outcomes[600])
    assert "rank 513 is more than the 512 that vLLM takes" in str(outcomes[700])
    assert "lm_head: vLLM leaves out what is added there" in str(outcomes[800])
    assert outcomes[300]["pack"] == 1
    here.evaluator.evaluate(RUN, 300, asked(1), here.storage)
    assert len(seen.alive) == 1


def test_an_adapter_that_vllm_leaves_out_without_a_word(here: Case, seen: Seen) -> None:
    seen.applies_adapters = False
    outcomes = together(here, asked())
    assert [type(outcome) for outcome in outcomes] == [AdapterHasNoEffect] * 4
    seen.applies_adapters = True
    assert all(isinstance(outcome, dict) for outcome in together(here, asked())), "nothing is remembered of them"


def test_an_engine_starts_again_when_it_is_outgrown(prepared: Case, tmp_path: Path, seen: Seen) -> None:
    evaluator = VllmEvaluator(prepared.model, "fp32", "fp32", True, prepared.sources, True)
    case, spec = elsewhere(prepared, evaluator, tmp_path / "results"), asked()
    case.evaluator.evaluate(BASE, 0, spec, case.storage)
    for steps in ((300,), (100,), (300, 100), (200,), (100,), (100, 200, 300)):
        together(case, spec, steps)
        assert len(seen.alive) == 1
    case.evaluator.evaluate(BASE, 0, asked(1), case.storage)
    started = [(engine.enable_lora, engine.max_lora_rank, engine.max_loras) for engine in seen.started]
    assert started == [(False, 16, 1), (True, 1, 1), (True, 8, 1), (True, 8, 2), (True, 16, 2), (True, 16, 3)]
    del case, evaluator
    assert not seen.alive, "its memory is given back with the evaluator"


def test_known_adapters_are_not_examined_again(here: Case, seen: Seen) -> None:
    together(here, asked())
    seen.asked.clear()
    together(here, asked(1))
    assert all(params.prompt_logprobs is None for _, params, _ in seen.asked)
    assert len(seen.started) == 1


def test_an_engine_that_fails_has_ended(here: Case, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = asked()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_standin.LLM, "_answer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            together(here, spec)
    assert not seen.alive
    assert all(isinstance(outcome, dict) for outcome in together(here, spec))


def test_a_family_that_vllm_gives_no_adapters(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path / "cache"))
    model, spec = tiny_model("gpt_neox"), asked()
    evaluator = VllmEvaluator(model, "fp32", "fp32", True, tmp_path, True)
    case = Case("gpt_neox", "fp32", model, evaluator, Storage(tmp_path / "results"), tmp_path)  # type: ignore[arg-type]
    case.write_adapter(100, 6.0)
    other = Evaluator(model, "fp32", "fp32", True, tmp_path, True, "cpu")
    case.evaluator.evaluate(BASE, 0, spec, case.storage)
    other.evaluate("c" * 12, 0, spec, case.storage)
    assert case.texts(0, spec, BASE) == case.texts(0, spec, "c" * 12)
    with pytest.raises(AdapterDoesNotFit, match=r"^vLLM: GPTNeoXForCausalLM does not support LoRA yet\.$"):
        case.evaluator.evaluate(RUN, 100, spec, case.storage)
    case.evaluator.evaluate(BASE, 0, asked(1), case.storage)


def test_an_engine_that_does_not_start_for_another_reason_is_told_as_it_is(here: Case, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", no_memory)
    with pytest.raises(ValueError, match="Free memory on device"):
        together(here, asked())


def base_spec(model: ModelConfig) -> BaseSpec:
    return BaseSpec(run_key=BASE, model=model, precision="fp32", compute_precision="fp32", model_parameters=1)


def test_an_evaluation_actor_with_vllm(prepared: Case, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    remote = SimpleNamespace(remote=lambda *arguments: told.append(arguments))
    tracker = SimpleNamespace(evaluation_started=remote, evaluation_ended=remote)
    case = elsewhere(prepared, prepared.evaluator, tmp_path / "results")
    made = EvaluationActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    place = EvaluationResources(engine="vllm", gpus=0.5)

    def actor() -> Any:
        return made("one", str(case.storage.root), str(case.sources), True, 1, tracker, place, 3)

    spec, checkpoints = asked(), [Checkpoint(RUN, step) for step in (100, 300)]
    outcomes = actor().evaluate(base_spec(case.model), checkpoints, spec, "two adapters")
    assert [outcome["engine"] for outcome in outcomes] == ["vllm", "vllm"]
    [engine] = seen.started
    assert (engine.max_loras, engine.gpu_memory_utilization) == (3, vllm_engine.MEMORY_SHARE / 2)
    assert json.loads((case.storage.run(RUN).evaluation(spec.folder, 300) / METRICS).read_text())["engine"] == "vllm"

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Refused) as refused:
        actor().evaluate(base_spec(case.model), checkpoints, asked(1), "two adapters")
    assert len(str(refused.value).splitlines()) == 1
    assert "resources: evaluation.engine: vllm, but vLLM cannot be imported here" in str(refused.value)
    assert "pip install 'jmedlora[vllm]'" in str(refused.value)


def test_which_evaluator_is_made(prepared: Case, seen: Seen) -> None:
    made = make_evaluator(base_spec(prepared.model), prepared.sources, True, EvaluationResources(engine="vllm"))
    assert isinstance(made, VllmEvaluator)
    assert isinstance(make_evaluator(base_spec(prepared.model), prepared.sources, True), Evaluator)
    once = base_spec(prepared.model).model_copy(update={"precision": "nf4", "double_quantisation": False})
    with pytest.raises(BadInput, match="vllm quantises the constants of NF4 once more"):
        make_evaluator(once, prepared.sources, True, EvaluationResources(engine="vllm"))


def test_nobody_is_told_that_vllm_is_used(prepared: Case, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    vllm_engine.import_vllm()
    assert {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items() <= dict(vllm_engine.os.environ).items()
    assert load_base(materialise(prepared.model, prepared.sources, True), "fp32", "fp32", True, "cpu").dtype == torch.float32
