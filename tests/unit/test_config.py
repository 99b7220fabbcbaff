"""Reading sweeps: composition, overrides, presets, and what is told about bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jmedlora.config.compose import load_sweep
from jmedlora.config.composition import sweep_names
from jmedlora.config.faults import BadInput
from jmedlora.config.locate import conf_dir
from jmedlora.config.parts import ApiSource

SWEEP = {
    "grid": {"model": ["tiny-llama"], "method": ["lora"], "rank": [2, 4], "epochs": [1]},
    "training": {"batch_size": 4},
}


def write_sweep(folder: Path, content: dict, name: str = "mine") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return str(path)


def faults_of(sweep: str, *overrides: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_sweep(sweep, list(overrides))
    lines = [str(fault) for fault in caught.value.faults]
    assert all("\n" not in line for line in lines)
    return lines


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_is_read(name: str) -> None:
    assert load_sweep(name).name == name


PRESETS = sorted(path for path in conf_dir().glob("*/*.yaml") if path.parent.name != "sweep")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_preset_is_valid(path: Path, tmp_path: Path) -> None:
    group, name = path.parent.name, path.stem
    content = dict(SWEEP)
    if group in ("model", "method"):
        content["grid"] = {**SWEEP["grid"], group: [name]}
    elif group in ("benchmark", "prompt"):
        content[f"{group}s"] = [name]
    elif group == "resources":
        content["resources"] = name
    else:
        content[group] = name
    load_sweep(write_sweep(tmp_path, content))


def test_overrides_replace_values_and_set_what_the_file_leaves_out() -> None:
    config = load_sweep("quickstart", ["grid.rank=[8,64]", "training.learning_rate=1e-4", "training.weight_decay=0.1", "offline=true"])
    assert config.grids[0]["rank"] == [8, 64]
    assert config.training["learning_rate"] == 1e-4
    assert config.training["weight_decay"] == 0.1
    assert config.offline


def test_an_override_inside_a_preset_keeps_the_rest_of_the_preset() -> None:
    config = load_sweep("jmedlora", ["resources.gpu_memory_gb=141", "resources.evaluation.actors=2"])
    assert config.resources.gpu_memory_gb == 141
    assert config.resources.evaluation.actors == 2
    assert config.resources.max_gpus == load_sweep("jmedlora").resources.max_gpus


def test_numbers_in_scientific_notation_are_floats(tmp_path: Path) -> None:
    path = tmp_path / "sci.yaml"
    path.write_text("grid: {model: [tiny-llama], method: [lora], learning_rate: [5e-4, 1e-3], epochs: [1]}\n")
    assert load_sweep(str(path)).grids[0]["learning_rate"] == [5e-4, 1e-3]


def test_a_users_file_finds_presets_beside_it_before_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny-llama.yaml").write_text("preset: tiny-gpt-neox\nlicence: own\n")
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources" / "box.yaml").write_text("preset: local\ncpus_per_worker: 2\n")
    config = load_sweep(write_sweep(tmp_path, {**SWEEP, "resources": "box"}))
    assert config.models["tiny-llama"].family == "gpt_neox"
    assert config.models["tiny-llama"].licence == "own"
    assert config.resources.cpus_per_worker == 2


def test_a_sweep_may_extend_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "wider.yaml"
    path.write_text("defaults: [quickstart, _self_]\ngrid: {rank: [32]}\n")
    config = load_sweep(str(path))
    assert config.grids[0]["rank"] == [32]
    assert config.grids[0]["model"] == ["smollm2-135m"]
    assert config.name == "wider"


def test_relative_paths_are_taken_from_the_file_and_on_the_command_line_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "study" / "rows.jsonl").write_text("")
    sweep = write_sweep(tmp_path / "study", {**SWEEP, "data": {"name": "rows", "path": "rows.jsonl"}, "storage": "out"})
    config = load_sweep(sweep, cwd=tmp_path)
    assert config.data["rows"].path == str(tmp_path / "study" / "rows.jsonl")
    assert config.storage == str(tmp_path / "study" / "out")
    config = load_sweep(sweep, ["data={name: rows, path: rows.jsonl}", "storage=out"], cwd=tmp_path)
    assert config.data["rows"].path == str(tmp_path / "rows.jsonl")
    assert config.storage == str(tmp_path / "out")


def test_a_path_of_ones_own_replaces_the_place_that_a_preset_names(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("")
    config = load_sweep("quickstart", [f"benchmarks=[{{preset: igakuqa, path: {questions}, filters: {{first: 3}}}}]"])
    benchmark = config.benchmarks[0]
    assert (benchmark.path, benchmark.source, benchmark.filters.first, benchmark.filters.choices) == (str(questions), None, 3, 5)


def test_several_faults_are_told_at_once_each_naming_place_value_and_what_is_allowed() -> None:
    lines = faults_of(
        "quickstart",
        "grid.rank=[0,4]",
        "grid.model=[smollm2]",
        "training.learning_rat=1e-3",
        "data={name: rows, path: /does/not/exist.jsonl}",
        "resources.gpus_per_worker=1",
        "resources.workers_per_trial=2",
        "evaluate.every=0",
        "colour=red",
    )
    text = "\n".join(lines)
    assert len(lines) == 7
    assert "grid.rank[0]: 0 is not allowed; allowed: at least 1" in text
    assert "grid.model[0]: unknown model 'smollm2'; allowed: did you mean 'smollm2-135m'?" in text
    assert "training.learning_rat: unknown run setting; allowed: did you mean 'learning_rate'?" in text
    assert "data.path: /does/not/exist.jsonl does not exist" in text
    assert "a trial needs 2 GPUs (2 workers x 1), the cluster has at most max_gpus=0" in text
    assert "evaluate.every: 0 is not allowed; allowed: 'epoch' or 'end' or at least 1" in text
    assert "colour: unknown key; allowed: one of benchmarks" in text
    assert all(line.startswith("command line: ") for line in lines)


def test_faults_of_the_file_name_the_file(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {**SWEEP, "trainin": {}})
    assert faults_of(sweep) == [
        f"{sweep}: trainin: unknown key; allowed: did you mean 'training'? one of benchmarks, data, deepspeed, evaluate, extra, grid, "
        "keep, leaks, note, offline, pack, prompts, references, resources, share_prefixes, shots, sources, storage, training"
    ]


@pytest.mark.parametrize("where", ["training", "grid"])
def test_epochs_and_max_steps_exclude_each_other(where: str) -> None:
    value = "max_steps=[5]" if where == "grid" else "max_steps=5"
    assert any("epochs and max_steps given; allowed: exactly one" in line for line in faults_of("smoke", "extra=[]", f"{where}.{value}"))


def test_neither_epochs_nor_max_steps_is_a_fault(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"grid": {"model": ["tiny-llama"], "method": ["lora"], "rank": [2]}})
    assert faults_of(sweep) == [f"{sweep}: grid.epochs: neither epochs nor max_steps given; allowed: exactly one of epochs and max_steps"]


def test_values_given_twice_are_a_fault() -> None:
    assert faults_of("quickstart", "grid.rank=[4,4]", "shots=[0,0]") == [
        "command line: grid.rank: 4 twice; allowed: each value once",
        "command line: shots: 0 twice; allowed: each value once",
    ]


def test_a_name_means_one_thing(tmp_path: Path) -> None:
    content = {**SWEEP, "extra": [{"model": {"preset": "tiny-gpt-neox", "name": "tiny-llama"}, "method": "lora", "epochs": 1}]}
    assert "a second, different model named 'tiny-llama'" in faults_of(write_sweep(tmp_path, content))[0]


@pytest.mark.parametrize("key", ["api_key", "hf_token", "password", "client_secret"])
def test_secrets_are_refused(tmp_path: Path, key: str) -> None:
    sweep = write_sweep(tmp_path, {**SWEEP, "training": {key: "hunter2"}})
    lines = faults_of(sweep)
    assert any(f"training.{key}: looks like a secret" in line for line in lines)
    assert all("hunter2" not in line for line in lines)


def test_reading_the_environment_is_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {**SWEEP, "storage": "${oc.env:HOME}"})
    assert "${oc.env:HOME} is not allowed" in faults_of(sweep)[0]


@pytest.mark.parametrize("text", ["grid: [", "grid: {a: 1, a: 2}", "- 1\n- 2", "grid: {model: [x}", "\tgrid: 1", "defaults: [nowhere]"])
def test_broken_yaml_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert len(faults_of(str(path))) >= 1


@pytest.mark.parametrize("override", ["rank", "grid.rank=[1", "=3", "grid.rank=[1,]]"])
def test_a_broken_override_is_told_as_such(override: str) -> None:
    assert faults_of("quickstart", override)[0].startswith("command line: ")


def test_an_unknown_sweep_names_the_known_ones() -> None:
    assert "did you mean 'quickstart'?" in faults_of("quikstart")[0]
    assert "does not exist" in faults_of("./nowhere.yaml")[0]


def test_inside_a_ray_job_a_relative_storage_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "'results' would lie in Ray's temporary copy" in faults_of("smoke")[0]
    assert load_sweep("smoke", [f"storage={tmp_path}"]).storage == str(tmp_path)


def test_an_override_reaches_into_lists() -> None:
    config = load_sweep("jmedlora", ["grid.rank=[8,64]", "grid.0.epochs=[2]", "grid.1.seed=[5]"])
    assert [grid["rank"] for grid in config.grids] == [[8, 64], [8, 64]]
    assert [grid["epochs"] for grid in config.grids] == [[2], [1, 3, 10]]
    assert "seed" not in config.grids[0]
    benchmark = load_sweep("quickstart", ["benchmarks.0.filters.first=3"]).benchmarks[0]
    assert (benchmark.name, benchmark.filters.first) == ("sample", 3)


def test_a_mapping_on_the_command_line_replaces_the_files() -> None:
    assert load_sweep("quickstart", ["grid={model: [tiny-llama], method: [lora], max_steps: [3]}", "extra=[]"]).grids == [
        {"model": ["tiny-llama"], "method": ["lora"], "max_steps": [3]}
    ]


def test_preset_folders_beside_the_file_do_not_disturb_overrides_of_the_same_name(tmp_path: Path) -> None:
    for group in ("resources", "data", "prompt"):
        (tmp_path / group).mkdir()
    (tmp_path / "resources" / "two.yaml").write_text("preset: local\nmax_failures: 1\n")
    sweep = write_sweep(tmp_path, SWEEP)
    assert load_sweep(sweep, ["resources=two"]).resources.max_failures == 1
    assert load_sweep(sweep, ["resources=gpu-8", "data=sample", "~training"]).resources.max_gpus == 8


def test_a_preset_built_on_another_has_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "short.yaml").write_text("preset: sample\nfilters: {first: 3}\n")
    config = load_sweep(write_sweep(tmp_path, {**SWEEP, "benchmarks": ["sample", "short"]}))
    assert [benchmark.name for benchmark in config.benchmarks] == ["sample", "short"]


def test_a_gguf_file_is_taken_from_the_folder_of_the_sweep(tmp_path: Path) -> None:
    model = {"preset": "tiny-llama", "name": "own", "source": {"kind": "gguf", "file": "w.gguf"}}
    config = load_sweep(write_sweep(tmp_path, {**SWEEP, "grid": {**SWEEP["grid"], "model": [model]}}), cwd=Path("/"))
    assert config.models["own"].source.file == str(tmp_path / "w.gguf")  # type: ignore[union-attr]


def test_a_sweep_is_not_its_own_default(tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_text("defaults: [smoke, _self_]\n")
    assert "smoke is this file itself" in faults_of(str(tmp_path / "smoke.yaml"))[0]


@pytest.mark.parametrize("name", ["a b.yaml", "a=b.yaml", "x.yml"])
def test_a_file_that_cannot_name_a_sweep_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(yaml.safe_dump(SWEEP))
    assert faults_of(str(tmp_path / name)) == [
        f"command line: SWEEP: {name!r} is not a name for a sweep; allowed: NAME.yaml, with letters, digits, -, _ and . in the name"
    ]


def test_a_japanese_name_names_a_sweep(tmp_path: Path) -> None:
    assert load_sweep(write_sweep(tmp_path / "研究", SWEEP, "比較")).name == "比較"


PROMPT = "template: '{% for e in examples %}{{ e.instruction }}{{ e.output }}{% endfor %}{{ instruction }}{{ input }}"


@pytest.mark.parametrize(
    ("group", "text", "told"),
    [
        ("prompt", PROMPT + "${oc.env:HOME}'", "${oc.env:HOME} is not allowed"),
        ("prompt", PROMPT + "'\napi_token: hf_secret", "api_token: looks like a secret"),
        ("prompt", "template: 'x", "own.yaml:1: not YAML"),
        ("prompt", "preset: own", "unknown prompt 'own'"),
        ("prompt", "- 1", "not a mapping"),
        ("resources", "max_gpu: 1", "max_gpu: unknown key; allowed: did you mean 'max_gpus'?"),
    ],
)
def test_faults_of_a_preset_name_its_file(tmp_path: Path, group: str, text: str, told: str) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_text(text)
    entry = {"prompts": ["own"]} if group == "prompt" else {group: "own"}
    lines = faults_of(write_sweep(tmp_path, {**SWEEP, **entry}))
    assert any((told in line and "own.yaml" in line) or (told in line and "unknown" in told) for line in lines), lines
    assert "hf_secret" not in "".join(lines)


def test_a_preset_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "own.yaml").write_bytes("template: 日本".encode("cp932"))
    assert "not UTF-8" in faults_of(write_sweep(tmp_path, {**SWEEP, "prompts": ["own"]}))[0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("grid.rank=[true]", "grid.rank[0]: true is not allowed; allowed: a whole number"),
        ("training.batch_size=true", "training.batch_size: true is not allowed; allowed: a whole number"),
        ("evaluate.every=true", "evaluate.every: true is not allowed"),
        ("grid.epochs=[inf]", "grid.epochs[0]: inf is not allowed; allowed: a finite number or null"),
        ("training.learning_rate=nan", "allowed: a finite number"),
        ("training.alpha=0r", "training.alpha: '0r' is not allowed; allowed: a number or a multiple of the rank such as 2r"),
        ("training.alpha=-3", "training.alpha: -3 is not allowed; allowed: greater than 0 or a text"),
        ("training.seed=99999999999999999999", "allowed: less than"),
        ("training.targets=q_proj", "training.targets: 'q_proj' is not allowed; allowed: 'attention' or 'all-linear' or a list"),
        ("training.max_grad_norm=big", "allowed: a number or null"),
        ("grid.model=['']", "grid.model[0]: '' is not allowed"),
        ("grid.rank=8", "grid.rank: 8 is not allowed; allowed: a list"),
        ("training=[]", "training: [] is not allowed; allowed: a mapping"),
        ("storage=", "storage: '' is not allowed"),
        ("data={name: x, path: ''}", "data.path: "),
        (
            "grid.model=[{name: x, family: llama, source: {kind: path, path: /tmp, revison: y}}]",
            "revison: unknown key; allowed: one of kind, path",
        ),
        (
            "references=[{name: x, source: {kind: api, base_url: 'http://h/v1', model: m, key_env: sk-secret}}]",
            "references[0].source.key_env: what is given is not allowed; allowed: the name of an environment variable",
        ),
        ("grid.rank=8,64", "command line: grid.rank=8,64: is not one value"),
        ("~nokey", "command line: ~nokey: there is no such key"),
        ("grid.7.rank=[1]", "there is no such key"),
        ("note=${oc.env:HOME}", "${...} is not allowed"),
    ],
)
def test_nonsense_on_the_command_line_is_told(override: str, told: str) -> None:
    lines = faults_of("quickstart", override)
    assert any(told in line for line in lines), lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("command line: ")


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://eu.api.openai.com", "OPENAI_API_KEY"),
        ("https://openai.com.evil.example/v1", "JMEDLORA_API_KEY"),
        ("https://notopenai.com/v1", "JMEDLORA_API_KEY"),
        ("https://evil.example/https://api.openai.com/v1", "JMEDLORA_API_KEY"),
        ("http://api.openai.com/v1", "JMEDLORA_API_KEY"),
        ("http://127.0.0.1:8000/v1", "JMEDLORA_API_KEY"),
    ],
)
def test_openais_key_goes_to_openai_alone(url: str, variable: str) -> None:
    assert ApiSource(kind="api", base_url=url, model="m").key_env == variable
    assert ApiSource(kind="api", base_url=url, model="m", key_env="OWN").key_env == "OWN"
