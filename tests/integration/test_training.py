"""One worker, in this process: engines at every ZeRO stage, the queue of a trial, failures, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from jmedlora.config.locate import cache_dir
from jmedlora.data.instructions import load_instructions
from jmedlora.data.rows import Instruction
from jmedlora.data.tokenisation import tokenise_rows
from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.lora import AdapterPack, Shape, target_modules
from jmedlora.models.source import materialise
from jmedlora.plan.checksums import verify
from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.plan.records import read_run, read_training
from jmedlora.plan.specs import RunSpec
from jmedlora.training.batches import MiniBatches
from jmedlora.training.engine import PackEngine
from jmedlora.training.loop import RunOutcome, train_trial
from jmedlora.training.process import this_worker
from jmedlora.training.schedule import factor
from tests.plain_lora import PlainLora
from tests.tiny import PROMPT, run_spec, trial_of, write_rows

STAGES = (0, 1, 2, 3)


class Told:
    """A listener that remembers its calls, and may raise at a step."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._interrupt_at = interrupt_at

    def on_run_start(self, run_key: str, total_steps: int) -> None:
        self.calls.append(("start", run_key, total_steps))

    def on_step(self, run_key: str, record: dict[str, Any]) -> None:
        self.calls.append(("step", run_key, record["step"]))
        if record["step"] == self._interrupt_at:
            raise KeyboardInterrupt

    def on_checkpoint(self, run_key: str, step: int) -> None:
        self.calls.append(("checkpoint", run_key, step))

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None:
        self.calls.append(("end", run_key, status))


pytestmark = pytest.mark.usefixtures("training_here")


def train(folder: Path, *specs: RunSpec, listener: Told | None = None) -> list[RunOutcome]:
    return train_trial(trial_of(*specs), Storage(folder), folder, True, listener or Told())


def adapter_of(folder: Path, spec: RunSpec, step: int | None = None) -> dict[str, Tensor]:
    checkpoint = Storage(folder).run(spec.run_key).checkpoint(step or spec.total_steps)
    verify(checkpoint)
    return load_file(checkpoint / ADAPTER_WEIGHTS)


def curve(folder: Path, spec: RunSpec, value: str = "loss") -> list[float]:
    return [record[value] for record in read_training(Storage(folder), spec.run_key)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def plain_reference(spec: RunSpec) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and weights of a plain loop: HF model and labels, torch's AdamW and clipping, whole mini-batches."""
    settings = spec.settings
    folder = materialise(spec.model, Path("unused"), True)
    tokenizer, model = load_tokenizer(folder), load_base(folder, spec.precision, "fp32", True, "cpu")
    plain = PlainLora(model, settings, spec.model.family)
    adapted = plain.model.train()
    rows = tokenise_rows(
        load_instructions(spec.data, Path("unused")).rows, PROMPT, tokenizer, f"reference-{spec.run_key}",
        settings.max_input_tokens, settings.max_target_tokens, cache_dir(),
    )  # fmt: skip
    batches = MiniBatches([len(ids) for ids in rows["input_ids"]], settings.batch_size, settings.seed, settings.length_grouping)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=settings.weight_decay)
    losses, norms = [], []
    for step in range(1, spec.total_steps + 1):
        taken = batches.rows_of(step)
        width = max(len(rows[row]["input_ids"]) for row in taken)
        ids = torch.full((len(taken), width), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for place, row in enumerate(taken):
            tokens, start = torch.tensor(rows[row]["input_ids"]), rows[row]["prompt_length"]
            ids[place, : len(tokens)] = tokens
            labels[place, start : len(tokens)] = tokens[start:]
        plain.enter(step, taken)
        loss = adapted(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels, use_cache=False).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm or float("inf")).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor(step, settings, spec.total_steps)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: value.detach().clone() for name, value in plain.weights().items()}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_stage_trains_as_a_plain_loop(family: Any, precision: Any, data_file: Path, tmp_path: Path) -> None:
    chosen = {
        "schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.3, "weight_decay": 0.1, "micro_batch_size": 2, "targets": "all-linear",
    }  # fmt: skip
    specs = [run_spec(data_file, family, precision, zero_stage=stage, **chosen) for stage in STAGES]
    losses, norms, weights = plain_reference(specs[0])
    assert max(norms) > 0.3, "nothing would be clipped"
    for stage, spec in zip(STAGES, specs, strict=True):
        folder = tmp_path / str(stage)
        assert train(folder, spec) == [RunOutcome(spec.run_key, "finished")]
        assert curve(folder, spec) == pytest.approx(losses, abs=1e-5)
        assert curve(folder, spec, "grad_norm") == pytest.approx(norms, rel=1e-4)
        assert_close(adapter_of(folder, spec), weights)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_stages_agree_in_bf16(precision: Any, data_file: Path, tmp_path: Path) -> None:
    first_steps, curves = [], []
    for stage in STAGES:
        spec = run_spec(data_file, "llama", precision, "bf16", stage, checkpoint_every=1, dropout=0.0, weight_decay=0.5)
        train(tmp_path / str(stage), spec)
        first_steps.append(adapter_of(tmp_path / str(stage), spec, 1))
        curves.append(curve(tmp_path / str(stage), spec))
    assert {tensor.dtype for tensor in first_steps[0].values()} == {torch.bfloat16}
    for stage in STAGES[1:]:
        # Where gradients are next to nothing, Adam's first step takes rounding for a direction.
        moved = torch.cat([(first_steps[stage][name] - first_steps[0][name]).flatten().abs() for name in first_steps[0]])
        assert (moved > 1e-3).float().mean() < 0.02
        assert curves[stage] == pytest.approx(curves[0], abs=5e-3)
    assert curves[0][-1] < curves[0][0] - 0.05


def test_the_engine_is_deepspeeds_at_the_asked_stage(data_file: Path) -> None:
    for stage in STAGES:
        spec = run_spec(data_file, zero_stage=stage)
        model = load_base(materialise(spec.model, data_file, True), "fp32", "fp32", True, "cpu")
        pack = AdapterPack(model, target_modules(model, spec.settings, "llama"), [Shape.of(spec.settings)], torch.device("cpu"))
        made = PackEngine(pack, [spec.settings], stage, "fp32", this_worker())
        assert type(made.engine).__name__ == "DeepSpeedEngine"
        assert made.engine.zero_optimization_stage() == stage
        sharded = [name for name, weight in model.named_parameters() if hasattr(weight, "ds_id")]
        assert bool(sharded) == (stage == 3)
        made.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_micro_batches_and_checkpointing_change_nothing(stage: int, data_file: Path, tmp_path: Path) -> None:
    whole = run_spec(data_file, zero_stage=stage, targets="all-linear")
    train(tmp_path / "whole", whole)
    for name, chosen in {
        "four": {"micro_batch_size": 2},
        "single rows": {"micro_batch_size": 1},
        "checkpointing": {"gradient_checkpointing": True, "micro_batch_size": 3},
    }.items():
        spec = run_spec(data_file, zero_stage=stage, targets="all-linear", **chosen)
        train(tmp_path / name, spec)
        assert curve(tmp_path / name, spec) == pytest.approx(curve(tmp_path / "whole", whole), abs=1e-5)
        assert_close(adapter_of(tmp_path / name, spec), adapter_of(tmp_path / "whole", whole))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "nf4"), (3, "fp32"), (3, "nf4")])
def test_a_queue_is_two_separate_trials(stage: int, precision: Any, data_file: Path, tmp_path: Path) -> None:
    first = run_spec(data_file, "gpt_neox", precision, zero_stage=stage, rank=8)
    second = run_spec(data_file, "gpt_neox", precision, zero_stage=stage, seed=3, targets="all-linear", length_grouping=True)
    train(tmp_path / "queue", first, second)
    train(tmp_path / "alone", second)
    train(tmp_path / "alone", first)
    for spec in (first, second):
        assert curve(tmp_path / "queue", spec) == curve(tmp_path / "alone", spec)
        assert_same(adapter_of(tmp_path / "queue", spec), adapter_of(tmp_path / "alone", spec))


def test_dropout_and_seed_matter(data_file: Path, tmp_path: Path) -> None:
    specs = [run_spec(data_file), run_spec(data_file, dropout=0.0), run_spec(data_file, seed=1)]
    train(tmp_path, *specs)
    curves = [curve(tmp_path, spec) for spec in specs]
    assert curves[0] != curves[1]
    assert curves[0] != curves[2]


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_saved_adapter_gives_the_trained_models_logits(
    family: Any, precision: Any, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_spec(data_file, family, precision)
    ids = torch.arange(60, 72).view(1, -1)
    seen: list[Tensor] = []
    inner = PackEngine.adapter_tensors

    def look(self: PackEngine, adapter: int) -> dict[str, Tensor]:
        self._pack.enter([RowsOfAdapter(range(len(ids)))])
        with torch.inference_mode():
            seen.append(self._pack.model.eval()(input_ids=ids).logits)
        return inner(self, adapter)

    monkeypatch.setattr(PackEngine, "adapter_tensors", look)
    assert train(tmp_path, spec)[0].status == "finished"
    base = load_base(materialise(spec.model, tmp_path, True), precision, "fp32", True, "cpu")
    with torch.inference_mode():
        bare = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, Storage(tmp_path).run(spec.run_key).checkpoint(spec.total_steps))
        logits = loaded(input_ids=ids).logits
    assert torch.equal(logits, seen[0])
    assert not torch.allclose(logits, bare, atol=1e-3)


def test_a_run_that_diverges_fails_alone(data_file: Path, tmp_path: Path) -> None:
    wild = run_spec(data_file, learning_rate=1e30, max_grad_norm=None)
    tame = run_spec(data_file)
    told = Told()
    outcomes = train(tmp_path / "both", wild, tame, listener=told)
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    assert outcomes[0].error is not None
    assert outcomes[0].error.startswith("step 2: the loss is")
    recorded = read_run(Storage(tmp_path / "both"), wild.run_key)
    assert recorded is not None
    assert (recorded["status"], recorded["error"]) == ("failed", outcomes[0].error)
    assert ("end", wild.run_key, "failed") in told.calls
    train(tmp_path / "alone", tame)
    assert_same(adapter_of(tmp_path / "both", tame), adapter_of(tmp_path / "alone", tame))


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_told(stage: int, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = PackEngine.backward

    def overflowing(self: PackEngine, batch: Any, labelled: list[float], last: bool) -> Tensor:
        return inner(self, batch, [1e-45] if last else labelled, last).new_zeros(1)

    monkeypatch.setattr(PackEngine, "backward", overflowing)
    outcomes = train(tmp_path, run_spec(data_file, zero_stage=stage, micro_batch_size=2))
    assert outcomes[0].error == "step 1: the gradient is not finite"


def test_an_error_fails_one_run_and_the_next_goes_on(data_file: Path, tmp_path: Path) -> None:
    changed = write_rows(tmp_path, [Instruction("a", "b", "c")] * 13)
    spoilt = run_spec(changed)
    write_rows(tmp_path, [Instruction("a", "b", "other")] * 13)
    unknown = run_spec(data_file, targets=["no_such_layer"])
    good = run_spec(data_file)
    outcomes = train(tmp_path, spoilt, unknown, good)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "finished"]
    assert "changed since the sweep was planned" in (outcomes[0].error or "")
    assert "no_such_layer" in (outcomes[1].error or "")
    recorded = read_run(Storage(tmp_path), unknown.run_key)
    assert recorded is not None
    assert recorded["status"] == "failed"
    assert "no_such_layer" in recorded["error"]


def test_finished_runs_are_skipped_and_unfinished_ones_go_on_where_they_stand(data_file: Path, tmp_path: Path) -> None:
    done = run_spec(data_file)
    halted = run_spec(data_file, seed=1, checkpoint_every=2)
    train(tmp_path, done)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, halted, listener=Told(interrupt_at=5))
    left = read_run(Storage(tmp_path), halted.run_key)
    assert left is not None
    assert left["status"] == "running"
    assert Storage(tmp_path).run(halted.run_key).is_committed(4)
    stray = Storage(tmp_path).run(halted.run_key).checkpoint(3)
    stray.mkdir()

    told = Told()
    outcomes = train(tmp_path, done, halted, listener=told)
    assert outcomes == [RunOutcome(done.run_key, "finished", skipped=True), RunOutcome(halted.run_key, "finished")]
    key = halted.run_key
    assert told.calls == [
        ("start", key, 6), ("step", key, 5), ("step", key, 6), ("checkpoint", key, 6), ("end", key, "finished"),
    ]  # fmt: skip
    assert not stray.exists()
    train(tmp_path / "fresh", halted)
    assert curve(tmp_path, halted) == curve(tmp_path / "fresh", halted)
    assert_same(adapter_of(tmp_path, halted), adapter_of(tmp_path / "fresh", halted))


def test_records_say_what_happened(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, max_input_tokens=24, max_target_tokens=4, schedule="linear", warmup_steps=1)
    train(tmp_path, spec)
    recorded = read_run(Storage(tmp_path), spec.run_key)
    assert recorded is not None
    expected = {
        "run_key": spec.run_key, "status": "finished", "error": None, "rows": 13, "total_steps": 6, "truncated_rows": 13,
        "workers": 1, "zero_stage": 0,
    }  # fmt: skip
    assert {key: recorded[key] for key in expected} == expected
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["started"] <= recorded["finished"]
    lines = read_training(Storage(tmp_path), spec.run_key)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[2]["epoch"] == 1
    assert lines[0]["learning_rate"] == 0
    assert all(line["tokens"] == 28 * rows for line, rows in zip(lines, [5, 5, 3, 5, 5, 3], strict=True))
    assert set(lines[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "time"}
    checkpoint = Storage(tmp_path).run(spec.run_key).checkpoint(6)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["inference_mode"]


def test_runs_that_cannot_share_a_base_are_refused(data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in base model"):
        train(tmp_path, run_spec(data_file), run_spec(data_file, "gpt_neox"))


def test_zero_3_leaves_torch_as_it_was(data_file: Path, tmp_path: Path) -> None:
    """DeepSpeed puts a function of its own in the place of torch's, which would hold more memory in every later run."""
    linear = torch.nn.functional.linear
    train(tmp_path, run_spec(data_file, zero_stage=3, max_steps=1))
    assert torch.nn.functional.linear is linear
