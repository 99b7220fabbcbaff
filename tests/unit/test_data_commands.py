"""The commands over data: what they list, count and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmedlora.cli.data import app, preset_names, read_benchmark
from jmedlora.config.faults import BadInput
from tests.exams import QUESTION, checkout, write


def output(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_every_shipped_benchmark_can_be_read_as_configuration(tmp_path: Path) -> None:
    names = preset_names("benchmark", tmp_path)
    assert {"igakuqa", "jjsimqa", "sample", "medqa_jp", "usmleqa_jp"} <= set(names)
    for name in names:
        assert read_benchmark(name, [], cwd=tmp_path).name == name


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION])
    config = read_benchmark("igakuqa", ["years=[2021]", "filters.choices=null", "shuffle=2"], data=Path("q.jsonl"), cwd=tmp_path)
    assert (config.path, config.source, config.shuffle) == (str(path), None, 2)
    assert (config.filters.years, config.filters.choices, config.filters.text_only) == ([2021], None, True)
    for change, told in [
        ("~a", "is not a change"),
        ("a", "cannot be read"),
        ("choices=1", "filters.choices: 1 is not allowed"),
        ("x=1", "x: unknown key"),
    ]:
        with pytest.raises(BadInput, match=f"command line: .*{told}"):
            read_benchmark("igakuqa", [change], cwd=tmp_path)
    with pytest.raises(BadInput, match="command line: BENCHMARK: unknown benchmark 'igakuq'; allowed: did you mean 'igakuqa'"):
        read_benchmark("igakuq", [], cwd=tmp_path)


def test_presets_of_ones_own_are_found_beside_the_shipped_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION])
    for folder, name in (("benchmark", "here"), ("conf/benchmark", "there")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.yaml").write_text("path: " + str(path))
    assert {"here", "there", "igakuqa"} <= set(preset_names("benchmark", tmp_path))
    assert read_benchmark("there", [], cwd=tmp_path).path == read_benchmark("here", [], cwd=tmp_path).path == str(path)


def test_list_tells_what_is_here(tmp_path: Path) -> None:
    write(tmp_path / "benchmarks/jjsimqa.jsonl", [QUESTION])
    rows = {(row["kind"], row["name"]): row for row in json.loads(output("list", "--sources", str(tmp_path), "--json"))}
    assert rows["benchmark", "jjsimqa"]["here"] is rows["benchmark", "sample"]["here"] is rows["data", "sample"]["here"] is True
    assert rows["benchmark", "igakuqa"] == {
        "kind": "benchmark",
        "name": "igakuqa",
        "here": False,
        "place": f"{tmp_path}/benchmarks/igakuqa",
        "from": "github.com/jungokasai/IgakuQA",
    }
    assert rows["data", "jmed-77k"]["from"] == "to be brought or made"
    assert "igakuqa" in output("list")


def test_show_counts_what_is_there_and_what_is_kept(tmp_path: Path) -> None:
    path = checkout(tmp_path)
    odd = {**QUESTION, "problem_id": "113C1", "choices": [], "answer": ["26"], "points": "3", "category": "眼科"}
    mended = {**QUESTION, "problem_id": "113C2", "answer": ["a", ",", "b"], "text_only": False}
    write(path / "data/2019/113-C.jsonl", [odd, mended])
    arguments = ("show", "igakuqa", "--data", str(path), "choices=3")
    facts = json.loads(output(*arguments, "--json"))
    source, evaluated = facts["source"], facts["evaluated"]
    assert (source["questions"], source["text_only"], source["numeric"], source["points"]) == (10, 9, 1, 12)
    assert source["choices"] == {"0": 1, "3": 9}
    assert source["answers"] == {"1": 9, "2": 1}
    assert source["categories"] == {"眼科": 1}
    assert source["sections"] == {"A": 4, "B": 4, "C": 2}
    assert {year: counts["questions"] for year, counts in source["years"].items()} == {"2018": 4, "2019": 6}
    assert (evaluated["questions"], evaluated["numeric"]) == (8, 0)
    assert facts["examples"] == ["100E5"]
    assert facts["notes"] == [f"{path}/data/2019/113-C.jsonl:2: answer: ['a', ',', 'b'] is read as a, b"]
    told = output(*arguments)
    assert f"  {facts['notes'][0]}\n" in told
    assert "choices: 3: 8" in told


def test_show_refuses_what_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"benchmark medqa_jp: not here yet: .*medqa_jp\.jsonl; `jmedlora data fetch medqa_jp` brings it"):
        CliRunner().invoke(app, ["show", "medqa_jp", "--sources", str(tmp_path)], catch_exceptions=False)


def test_fetch_of_what_is_here_only_tells_where() -> None:
    assert output("fetch", "sample").strip().endswith("sample/questions.jsonl")
