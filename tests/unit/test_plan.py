"""From a sweep to runs and trials: the grid, identities, estimates, and checks across settings."""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from jmedlora.config.compose import load_sweep
from jmedlora.config.digest import canonical_json, digest_rows
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import Architecture
from jmedlora.plan.allocations import weight_bytes
from jmedlora.plan.checks import check_storage
from jmedlora.plan.estimates import concurrent_trials
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.planner import checkpoint_steps, make_plan, open_sweep
from jmedlora.plan.rendering import plan_as_json, print_plan
from jmedlora.plan.shapes import lora_parameters, model_parameters
from jmedlora.plan.specs import Plan
from jmedlora.plan.writing import read_plan, write_plan

TEMPLATE = "{% for e in examples %}{{ e.instruction }}{{ e.output }}{% endfor %}{{ instruction }}{{ input }}"

MANY = ",".join(map(str, range(1, 401)))


def plan_of(*overrides: str, sweep: str = "smoke") -> Plan:
    return open_sweep(sweep, list(overrides))[1]


@cache
def key_with(*overrides: str) -> str:
    return plan_of("extra=[]", *overrides).runs[0].run_key


def test_the_quickstart_is_five_runs_over_two_bases() -> None:
    plan = plan_of(sweep="quickstart")
    assert [(run.settings.method, run.settings.rank, run.settings.epochs) for run in plan.runs] == [
        ("lora", 4, 1),
        ("lora", 4, 3),
        ("lora", 16, 1),
        ("lora", 16, 3),
        ("qlora", 16, 1),
    ]
    assert [base.precision for base in plan.bases] == ["fp32", "nf4"]
    assert {run.base_key for run in plan.runs} == {base.run_key for base in plan.bases}
    assert [evaluation.shots for evaluation in plan.evaluations] == [0, 1]


def test_the_study_is_planned_without_its_weights_and_data() -> None:
    config, plan = open_sweep("jmedlora")
    models = {run.model.name for run in plan.runs}
    assert models == {"open-calm-7b", "medcalm", "llama2-70b-chat"}
    assert {(run.settings.method, run.settings.rank, run.settings.epochs) for run in plan.runs} == {
        (method, rank, epochs) for method in ("lora", "qlora") for rank in (8, 64, 128) for epochs in (1, 3, 10)
    }
    assert len(plan.runs) == 27
    assert all(run.provisional for run in plan.runs)
    assert len(plan.missing) == 6
    assert {run.total_steps for run in plan.runs if run.settings.epochs == 1} == {9678}
    totals = plan_as_json(plan, config)["totals"]
    assert totals["concurrent_trials"] == 7


def test_names_tell_runs_apart() -> None:
    plan = plan_of("grid.learning_rate=[1e-4,1e-3]", "grid.seed=[0,1]", "extra=[]")
    names = names_of(plan)
    assert len(set(names.values())) == len(names) == 5


@pytest.mark.parametrize(("every", "expected"), [("epoch", [7, 14, 20]), ("end", [20]), (6, [6, 12, 18, 20]), (10, [10, 20]), (50, [20])])
def test_checkpoint_steps_always_end_with_the_last_step(every: str | int, expected: list[int]) -> None:
    assert checkpoint_steps(every, steps_per_epoch=7, total_steps=20) == expected


# ---------------------------------------------------------------- identity


def test_keys_are_the_same_everywhere(tmp_path: Path) -> None:
    """Golden values: a change here makes every user's finished run count as new."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "問い", "input": "甲,乙", "output": "甲"}\n', encoding="utf-8")
    plan = plan_of(f"data={{name: golden, path: {tmp_path / 'rows.jsonl'}}}", "prompts=[{name: golden, template: '" + TEMPLATE + "'}]")
    assert [run.run_key for run in plan.runs] == ["ec50c66c948b", "647b1bd173a4"]
    assert [run.trajectory_key for run in plan.runs] == ["e212ec7331a3", "6ac2cbf542fc"]
    assert [base.run_key for base in plan.bases] == ["01a002c06196", "f160823ff4bd"]


@pytest.mark.parametrize(
    "override",
    [
        "grid.rank=[5]",
        "training.alpha=7",
        "training.dropout=0.3",
        "training.targets=all-linear",
        "training.learning_rate=1e-4",
        "training.schedule=cosine",
        "training.warmup_steps=2",
        "training.batch_size=4",
        "training.weight_decay=0.1",
        "training.max_grad_norm=0.5",
        "training.max_grad_norm=null",
        "training.max_input_tokens=100",
        "training.max_target_tokens=100",
        "training.length_grouping=true",
        "training.seed=1",
        "grid.epochs=[2]",
        "grid.method=[qlora]",
        "grid.model=[tiny-gpt-neox]",
        "prompts=[{name: other, template: '" + TEMPLATE + "'}]",
    ],
)
def test_what_changes_an_adapter_changes_its_key(override: str) -> None:
    assert key_with(override) != key_with()


@pytest.mark.parametrize(
    "override",
    [
        "resources.workers_per_trial=2",
        "deepspeed=zero2",
        "training.micro_batch_size=2",
        "training.gradient_checkpointing=true",
        "training.alpha=4r",
        "shots=[0]",
        "evaluate.every=2",
        "evaluate.max_new_tokens=3",
        "benchmarks=[sample]",
        "note=hello",
    ],
)
def test_what_does_not_change_an_adapter_keeps_its_key(override: str) -> None:
    base = ("training.alpha=16",)
    assert key_with(*base, override) == key_with(*base)


def test_a_duration_in_steps_and_the_same_in_epochs_are_one_run() -> None:
    steps = plan_of("extra=[]").runs[0].total_steps
    assert key_with("~grid.epochs", f"training.max_steps={steps}") == key_with()


def test_trajectories_are_shared_only_where_the_schedule_has_no_horizon() -> None:
    def trajectories(schedule: str) -> int:
        return len({run.trajectory_key for run in plan_of("extra=[]", "grid.epochs=[1,2,3]", f"training.schedule={schedule}").runs})

    assert trajectories("constant") == 1
    assert trajectories("cosine") == trajectories("linear") == 3


def test_where_a_file_lies_and_how_it_is_formatted_does_not_matter(tmp_path: Path) -> None:
    rows = [{"instruction": "問い", "input": "", "output": "答え"}, {"instruction": "二", "output": "b", "extra": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False, indent=3))
    keys = {key_with(f"data={{name: {name}, path: {tmp_path / name}}}") for name in ("a.jsonl", "b.json")}
    assert len(keys) == 1


def test_evaluation_keys_depend_on_questions_shots_prompt_and_decoding() -> None:
    def keys(*overrides: str) -> set[str]:
        return {evaluation.evaluation_key for evaluation in plan_of("extra=[]", *overrides).evaluations}

    assert len(keys()) == 2
    assert keys("evaluate.batch_size=3") == keys()
    for change in (
        "evaluate.max_new_tokens=9",
        "benchmarks=[sample]",
        "benchmarks=[{preset: sample, filters: {first: 8, exclude: [S1A1]}}]",
    ):
        assert not keys(change) & keys()


def test_canonical_json_has_one_spelling_per_value() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None, 0.5, "か"]}) == '{"a":[true,null,0.5,"か"],"b":1}'
    assert digest_rows([{"a": 1}, {"b": 2}]) != digest_rows([{"b": 2}, {"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


# ---------------------------------------------------------------- shapes and estimates


def test_parameter_counts_of_the_studys_models() -> None:
    counts = {run.model.name: run.model_parameters for run in plan_of(sweep="jmedlora").runs}
    assert counts["open-calm-7b"] == 6_871_982_080
    assert counts["llama2-70b-chat"] == 68_976_648_192


def test_lora_parameters_by_hand() -> None:
    shape = Architecture(layers=3, hidden_size=8, intermediate_size=16, heads=4, kv_heads=2, vocabulary=10)
    assert lora_parameters("llama", shape, 2, "attention") == 3 * 2 * ((8 + 8) + (8 + 4) + (8 + 4))
    assert lora_parameters("gpt_neox", shape, 2, "attention") == 3 * 2 * (8 + 24)
    assert lora_parameters("llama", shape, 2, ["down_proj"]) == 3 * 2 * (16 + 8)
    assert model_parameters("llama", shape) > lora_parameters("llama", shape, 2, "all-linear")


def test_nf4_takes_about_half_a_byte_a_weight() -> None:
    shape = Architecture(layers=80, hidden_size=8192, intermediate_size=28672, heads=64, kv_heads=8, vocabulary=32000)
    assert 35e9 < weight_bytes(shape, "llama", "nf4") < 38e9
    assert weight_bytes(shape, "llama", "bf16") == 2 * 68_976_648_192


def test_trials_at_once_leave_room_for_evaluation() -> None:
    resources = load_sweep("jmedlora", ["resources.max_gpus=9", "resources.workers_per_trial=2"]).resources
    assert concurrent_trials(resources) == 4
    assert concurrent_trials(load_sweep("quickstart").resources) is None


def test_the_plan_survives_storage(tmp_path: Path) -> None:
    config, plan = open_sweep("quickstart", [f"storage={tmp_path}"])
    storage = Storage(config.storage_path)
    assert read_plan(storage, plan.sweep) is None
    write_plan(config, plan, storage)
    assert read_plan(storage, plan.sweep) == plan


def test_settings_that_spell_the_same_adapter_are_one_run() -> None:
    plan = plan_of("extra=[]", "grid.alpha=[8,2r,9]", "grid.micro_batch_size=[1,2]")
    assert [run.settings.alpha_value for run in plan.runs] == [8, 9]
    assert [note.split(" (")[0] for note in plan.notes] == ["4 of 6 combinations are the same adapter as another"]
    assert plan_of("extra=[]").notes == []


def test_the_printed_plan_counts_in_english_and_tells_what_was_put_together() -> None:
    config, plan = open_sweep("smoke", ["extra=[]", "grid.deepspeed=[zero0,zero2]"])
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    print_plan(plan, config, console)
    text = console.export_text()
    assert "1 run in 1 trial over 1 base: " in text
    assert "1 of 2 combinations is the same adapter as another" in text


# ---------------------------------------------------------------- checks across settings


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("grid.rank=[65]", "grid.rank: 65 is greater than the layers of tiny-llama are wide; allowed: at most 64"),
        ("training.targets=[q_prj]", "training.targets: 'q_prj' is not a linear layer of tiny-llama; allowed: q_proj, k_proj"),
        ("training.max_input_tokens=1000", "is more than tiny-llama can hold; allowed: together at most 1024"),
        ("shots=[4]", "shots: 4 is not possible with benchmark sample, which has 3 examples"),
        ("prompts=[{name: p, template: '{{ instruction }}'}]", "prompt p: template: never shows {{ input }}"),
        ("prompts=[{name: p, template: '{{ nope }}'}]", "prompt p: template: 'nope' is undefined"),
        ("prompts=[{name: p, template: '{% if %}'}]", "prompt p: template: "),
        ("training.max_steps=1000000000", "evaluate.every: epoch would write 142857142 checkpoints of a run of 1000000000 steps"),
        (
            f"grid.seed=[{MANY}]",
            "grid: 160000 runs; allowed: at most",
        ),
        ("evaluate.max_new_tokens=1024", "evaluate.max_new_tokens: 1024 leaves no room for a prompt in the 1024 positions of tiny-llama"),
        (
            "prompts=[{preset: step-by-step-ja, max_new_tokens: 1024}]",
            "prompt step-by-step-ja: max_new_tokens: 1024 leaves no room for a prompt in the 1024 positions of tiny-llama",
        ),
        ("prompts=[alpaca-ja,chat-ja]", "prompts: tiny-llama has no chat template, which prompt chat-ja needs"),
        (
            "benchmarks=[sample,{preset: sample, name: again}]",
            "benchmarks: again with prompt alpaca-ja asks the very same as sample with prompt alpaca-ja",
        ),
        (
            "prompts=[alpaca-ja,{preset: alpaca-ja, name: again}]",
            "prompts: sample with prompt again asks the very same as sample with prompt alpaca-ja",
        ),
        (f"benchmarks=[{{preset: sample, name: '{'問' * 80}'}}]", "make the name of a folder of more than 255 bytes"),
        ("training.targets=[]", "training.targets: no targets; allowed: at least one of q_proj"),
        ("training.warmup_steps=8", "training.warmup_steps: 8 is more than the 7 steps of a run; allowed: at most 7"),
        ("grid.epochs=[inf]", "grid.epochs"),
        ("grid.epochs=[1e308]", "training.epochs: a run of more than 1e+12 steps"),
        ("training.alpha=0r", "training.alpha: '0r' is not allowed"),
        ("grid.alpha=[" + "9" * 400 + "r]", "alpha"),
        (
            "grid.model=[{preset: tiny-llama, name: o, architecture: {heads: 5}}]",
            "model o: architecture.heads: 5 heads do not divide hidden_size 64; allowed: a divisor of it",
        ),
        (
            "grid.model=[{preset: tiny-llama, name: o, architecture: {kv_heads: 3}}]",
            "model o: architecture.kv_heads: 3 do not divide 4 heads; allowed: a divisor of them",
        ),
        (
            "grid.model=[{preset: tiny-llama, name: o, architecture: {hidden_size: 60, heads: 4, kv_heads: 2}}]",
            "model o: architecture.heads: 4 heads are 15 wide, and positions turn pairs of values; allowed: heads of an even width",
        ),
        (
            "grid={model: [{preset: tiny-gpt-neox, name: o, architecture: {hidden_size: 62, heads: 1, kv_heads: 1}}], method: [qlora], "
            "epochs: [1]}",
            "model o: architecture: query_key_value of o has 62 x 186 weights, which NF4 cannot pack; allowed: a multiple of 8",
        ),
        ("grid.model=[{preset: tiny-llama, name: o, source: {kind: named, name: ../../etc}}]", "'../../etc' is not allowed"),
        ('prompts=[{name: p, template: "\\ud800{{ instruction }}"}]', "template"),
        ("storage=s3://bucket/x", "storage: s3://bucket/x is not a local folder"),
    ],
)
def test_combinations_that_would_fail_late_are_told_early(override: str, told: str) -> None:
    overrides = [override]
    if "max_steps" in override:
        overrides.append("~grid.epochs")
    if "seed" in override:
        overrides.append(f"grid.rank=[{MANY}]")
    with pytest.raises(BadInput) as caught:
        plan_of("extra=[]", *overrides)
    assert told in "\n".join(str(fault) for fault in caught.value.faults)


VLLM = ("resources=gpu-1", "resources.evaluation.engine=vllm", "grid.model=[tiny-llama]", "extra=[]")


def test_vllm_is_no_part_of_what_is_asked() -> None:
    plan, other = plan_of(*VLLM), plan_of("resources=gpu-1", "grid.model=[tiny-llama]", "extra=[]")
    assert plan == other
    assert "vllm" not in sys.modules


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["resources.gpus_per_worker=0"],
            "resources.evaluation.engine: vllm needs a GPU, and gpus_per_worker is 0; allowed: transformers, or gpus_per",
        ),
        (
            ["grid.model=[tiny-llama,tiny-gpt-neox]"],
            "resources.evaluation.engine: vllm takes no adapters to tiny-gpt-neox, a model of the family gpt_neox; allowed: transformers",
        ),
        (
            ["grid.method=[{preset: qlora, name: qlora, double_quantisation: false}]"],
            "resources.evaluation.engine: vllm has no NF4 without double quantisation, which method qlora asks for; allowed: transformers",
        ),
        (
            ["grid.rank=[4,513]"],
            "resources.evaluation.engine: vllm takes adapters of rank 512 at most, and there is one of rank 513; allowed: transformers",
        ),
        (["evaluate.precision=fp32"], "evaluate.precision: vllm computes adapters in bf16 alone; allowed: auto, bf16 or nf4"),
        (["resources.evaluation.engine=vlm"], "resources.evaluation.engine: 'vlm' is not allowed; allowed: 'transformers' or 'vllm'"),
    ],
)
def test_what_vllm_cannot_do_is_told_early(overrides: list[str], told: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan_of(*VLLM, *overrides)
    assert sum(told in str(fault) for fault in caught.value.faults) == 1, caught.value


def test_a_base_alone_may_be_of_any_family() -> None:
    engine = ("resources=gpu-1", "resources.evaluation.engine=vllm")
    assert plan_of(*engine, "references=[tiny-gpt-neox]", sweep="evaluate").bases[0].compute_precision == "bf16"


def test_faults_inside_data_are_told_together_with_those_of_the_configuration(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(BadInput) as caught:
        plan_of(f"data={{name: rows, path: {rows}}}", "grid.rank=[0]")
    told = [str(fault) for fault in caught.value.faults]
    assert any("grid.rank[0]: 0 is not allowed" in line for line in told)
    assert f"{rows}:2: output: missing; allowed: a text that is not empty" in told


def test_a_config_json_stands_in_for_the_architecture(tmp_path: Path) -> None:
    facts = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    (tmp_path / "model.safetensors").write_bytes(b"")
    model = f"grid.model=[{{name: own, family: llama, source: {{kind: path, path: {tmp_path}}}}}]"
    shape = Architecture(layers=2, hidden_size=32, intermediate_size=64, heads=4, kv_heads=2, vocabulary=300, tied_embeddings=True)
    assert plan_of("extra=[]", model).runs[0].model_parameters == model_parameters("llama", shape)

    for content, told in (
        (json.dumps({**facts, "model_type": "gpt_neox"}), "config.json: model_type: 'gpt_neox' is not 'llama'"),
        ("[]", "config.json: not an object"),
        ("[" * 100_000, "config.json: cannot be read"),
        (json.dumps({**facts, "hidden_size": "x"}), "config.json: hidden_size: 'x' is not allowed"),
        (json.dumps({**facts, "num_attention_heads": None, "num_key_value_heads": None}), "config.json: num_attention_heads: missing"),
        (json.dumps({**facts, "num_attention_heads": 5}), "config.json: num_attention_heads: 5 heads do not divide hidden_size 32"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(BadInput) as caught:
            plan_of("extra=[]", model)
        assert told in str(caught.value.faults[0])


def test_a_model_folder_without_weights_is_a_fault(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "own"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for source in (f"{{kind: path, path: {folder}}}", "{kind: named, name: own}"):
        with pytest.raises(BadInput, match=f"{folder} holds no safetensors weights"):
            plan_of("extra=[]", f"grid.model=[{{preset: tiny-llama, name: own, source: {source}}}]", f"sources={tmp_path}")


def test_ten_thousand_runs_are_planned() -> None:
    plan = make_plan(load_sweep("smoke", ["extra=[]", f"grid.seed=[{','.join(map(str, range(5000)))}]", "grid.rank=[2,4]"]))
    assert len({run.run_key for run in plan.runs}) == 10_000


def test_a_gguf_file_counts_by_its_name_and_size_not_by_where_it_lies(tmp_path: Path) -> None:
    def key(folder: str, content: bytes) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.gguf").write_bytes(b"GGUF" + content)
        source = f"{{kind: gguf, file: {tmp_path / folder / 'w.gguf'}}}"
        return key_with(f"grid.model=[{{preset: tiny-llama, name: own, source: {source}}}]")

    assert key("a", b"x" * 10) == key("b", b"y" * 10)
    assert key("c", b"x" * 11) != key_with()
    assert len({key("d", b"x" * 10), key("e", b"x" * 11)}) == 2


def test_a_file_that_is_no_gguf_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(BadInput, match=r"model own: source.file: .*w.gguf is not a GGUF file"):
        plan_of("extra=[]", f"grid.model=[{{preset: tiny-llama, name: own, source: {{kind: gguf, file: {tmp_path / 'w.gguf'}}}}}]")


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        ("/etc/passwd", "is a file"),
        ("/etc/passwd/a/b", "cannot be made below the file /etc/passwd"),
        ("/proc/x", "cannot be written"),
        ("/sys/x", "cannot be written"),
        ("/tmp/a\0b", "cannot be a folder: embedded null byte"),
        ("/nowhere/" + "あ" * 100, "has a name of more than 255 bytes"),
        ("/tmp" + "/abcdefghi" * 600, "cannot be a folder: File name too long"),
    ],
)
def test_storage_that_cannot_be_made_is_told_without_trying(storage: str, told: str) -> None:
    faults: list[Fault] = []
    check_storage(load_sweep("smoke").model_copy(update={"storage": storage}), faults)
    assert [(fault.key, told in fault.problem) for fault in faults] == [("storage", True)], faults


def test_storage_that_can_be_made_is_not_made_by_the_check(tmp_path: Path) -> None:
    faults: list[Fault] = []
    check_storage(load_sweep("smoke").model_copy(update={"storage": str(tmp_path / "a" / "b")}), faults)
    assert (faults, list(tmp_path.iterdir())) == ([], [])
