"""The commands over data: what they list, count and refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jmedlora.cli.data import _print_facts, _print_standings, app, read_benchmark
from jmedlora.config.faults import BadInput
from jmedlora.config.presets import preset_names
from jmedlora.data.counting import count_questions
from tests.exams import QUESTION, checkout, write


def output(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_every_shipped_benchmark_can_be_read_as_configuration(tmp_path: Path) -> None:
    names = preset_names("benchmark")
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
        ("year=[2018]", "year: unknown key; allowed: did you mean 'years'. one of answers, categories, choices, .*, text_only, years$"),
        ("shufle=1", "shufle: unknown key; allowed: did you mean 'shuffle'. one of .*"),
        ("filters.year=[2018]", "filters.year: unknown key; allowed: did you mean 'years'"),
    ]:
        with pytest.raises(BadInput, match=f"command line: .*{told}"):
            read_benchmark("igakuqa", [change], cwd=tmp_path)
    with pytest.raises(BadInput, match="command line: BENCHMARK: unknown benchmark 'igakuq'; allowed: did you mean 'igakuqa'"):
        read_benchmark("igakuq", [], cwd=tmp_path)


def test_a_file_or_folder_stands_in_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "my exam.v2.jsonl", [QUESTION])
    config = read_benchmark("my exam.v2.jsonl", ["choices=3", "shuffle=2"])
    assert (config.name, config.path, config.filters.choices, config.shuffle) == ("my-exam-v2", str(path), 3, 2)
    checkout(tmp_path / "exam")
    checkout(tmp_path / "sample")
    for name in ("exam", "./exam", str(tmp_path / "exam")):
        assert (read_benchmark(name, []).name, read_benchmark(name, []).path) == ("exam", str(tmp_path / "exam"))
    assert read_benchmark("sample", []).bundled  # a name is a preset's first
    assert read_benchmark("./sample", []).path == str(tmp_path / "sample")
    assert json.loads(output("show", "exam", "--json"))["source"]["questions"] == 8
    with pytest.raises(BadInput, match=r"BENCHMARK: none\.csv does not exist; allowed: a benchmark's name, or a file or folder"):
        read_benchmark("none.csv", [])
    with pytest.raises(BadInput, match="command line: --data: given together with exam"):
        read_benchmark("exam", [], data=path)


def test_presets_of_ones_own_are_found_beside_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION])
    for folder, name in (("benchmark", "here"), ("conf/benchmark", "there")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.yaml").write_text("path: " + str(path))
    monkeypatch.chdir(tmp_path)
    assert {"here", "there", "igakuqa"} <= {row["name"] for row in json.loads(output("list", "--json"))}
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


def printed(width: int, show: Callable[[Console], None]) -> list[str]:
    text = io.StringIO()
    show(Console(file=text, width=width))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_break_no_word_and_cut_no_number(width: int) -> None:
    rows = json.loads(output("list", "--json", "--sources", "sources"))
    lines = printed(width, lambda console: _print_standings(rows, console))
    for row in rows:
        for text in (row["name"], row["place"], row["from"]):
            assert any(text in line for line in lines)
    counts = dict.fromkeys(count_questions([]), 12345) | {"answers": {1: 12000, 2: 300, 3: 45}}
    tallies = {"choices": {5: 12345}, "sections": {}, "categories": {}}
    facts = {"benchmark": "x", "path": "q.jsonl", "filters": {}, "source": {**counts, "years": {2018: counts}}}
    facts |= {"evaluated": {**counts, **tallies}, "examples": [], "notes": []}
    lines = printed(width, lambda console: _print_facts(facts, console))
    assert all(len(line) <= width for line in lines)
    for head in ("2018", "all", "evaluated"):
        [line] = [line for line in lines if line.startswith(f"{head} ")]
        assert line.split()[1:] == ["12345"] * 4 + ["12000/300/45", "12345", "12345"]


def test_show_refuses_what_is_not_here(tmp_path: Path) -> None:
    told = f"`jmedlora data fetch medqa_jp --sources {tmp_path}` brings it"
    with pytest.raises(BadInput, match=rf"benchmark medqa_jp: not here yet: .*medqa_jp\.jsonl; {told}"):
        CliRunner().invoke(app, ["show", "medqa_jp", "--sources", str(tmp_path)], catch_exceptions=False)


def test_fetch_of_what_is_here_only_tells_where() -> None:
    assert output("fetch", "sample").strip().endswith("sample/questions.jsonl")
