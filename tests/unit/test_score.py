from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from jmedlora.cli.data import read_benchmark
from jmedlora.cli.score import Marks, score, score_files
from jmedlora.config.faults import BadInput
from jmedlora.evaluation.prediction_files import read_prediction_files

# Correct answers and points of the published predictions, 2018 to 2021.
PUBLISHED = {
    "gpt4": [(302, 382), (304, 385), (306, 387), (308, 398)],
    "chatgpt": [(208, 266), (205, 250), (212, 266), (225, 297)],
    "gpt3": [(161, 209), (166, 210), (160, 208), (157, 203)],
    "translate_chatgpt-en": [(221, 281), (219, 274), (207, 263), (229, 289)],
    "student-majority": [(374, 472), (372, 470), (373, 471), (377, 477)],
}
SECTIONS = {"112-A": ["a", "b", "a,c"], "112-B": ["d", "a or d", "26"], "113-A": ["e", "e", "e"]}
IDS = [f"{section.replace('-', '')}{i}" for section, answers in SECTIONS.items() for i in range(1, len(answers) + 1)]
POINTS = {"112B1": 3}


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exam of three sections in IgakuQA's layout, written for this test."""
    root = tmp_path_factory.mktemp("exam")
    for section, answers in SECTIONS.items():
        folder = root / "data" / ("2018" if section.startswith("112") else "2019")
        folder.mkdir(parents=True, exist_ok=True)
        rows, facts = [], []
        for i, answer in enumerate(answers, start=1):
            problem_id = f"{section.replace('-', '')}{i}"
            choices = [] if answer.isdigit() else ["壊血病", "痛風", "夜盲症", "緑内障", "喘息"]
            letters = [answer] if " or " in answer or answer.isdigit() else answer.split(",")
            row = {"problem_id": problem_id, "problem_text": f"第{problem_id}問はどれか。", "choices": choices, "text_only": i != 2}
            rows.append(row | {"answer": letters, "points": str(POINTS.get(problem_id, 1))})
            facts.append({"problem_id": problem_id, "category": "小児科" if i == 1 else "皮膚科", "kinki": ["e"] if choices else []})
            facts[-1] |= {"reason": "", "human_accuracy": "50.0", "breakdown": []}
        for name, lines in ((section, rows), (f"{section}_metadata", facts)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return root


def written(folder: Path, predictions: Sequence[tuple[str, str]], name: str = "predictions.jsonl") -> Path:
    path = folder / name
    lines = (json.dumps({"problem_id": item, "prediction": text}, ensure_ascii=False) for item, text in predictions)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def marks(exam: Path, *files: Path, parse: bool = False) -> Marks:
    return score_files(files, read_benchmark("igakuqa", [], exam), Path("sources"), parse)


RIGHT = [("112A1", "a"), ("112A2", "b"), ("112A3", "a,c"), ("112B1", "d"), ("112B2", "a"), ("112B3", "26")]


@pytest.mark.parametrize("system", PUBLISHED)
def test_published_predictions_get_their_published_marks(system: str, shared_data: Path) -> None:
    benchmark = read_benchmark("igakuqa", [], shared_data / "igakuqa")
    found = []
    for year in (2018, 2019, 2020, 2021):
        files = sorted((shared_data / "igakuqa" / "baseline_results" / str(year)).glob(f"*-?_{system}.jsonl"))
        assert len(files) == 6
        result = score_files(files, benchmark, Path("sources"))
        assert (result.result.all.total, result.missing, result.unknown, result.duplicate) == (400, [], [], [])
        found.append((result.result.all.correct, result.result.all.points))
    assert found == PUBLISHED[system]


def test_everything_right(exam: Path, tmp_path: Path) -> None:
    told = marks(exam, written(tmp_path, RIGHT)).as_dict()
    assert (told["correct"], told["total"], told["accuracy"], told["points"], told["points_total"]) == (6, 6, 1.0, 8, 8)
    assert told["sections"] == ["112A", "112B"]
    assert not any(told[key] for key in ("missing", "blank", "unreadable", "unknown", "duplicate", "excluded"))
    assert {key: row["correct"] for key, row in told["by_year"].items()} == {"2018": 6}
    assert {key: row["points"] for key, row in told["by_section"].items()} == {"112A": 3, "112B": 5}
    assert {key: row["total"] for key, row in told["by_category"].items()} == {"小児科": 2, "皮膚科": 4}
    assert told["verdict"]["outcome"] == "undecided"


def test_the_denominator_is_each_section_that_occurs(exam: Path, tmp_path: Path) -> None:
    result = marks(exam, written(tmp_path, [("112A2", "b")]))
    assert (result.result.all.correct, result.result.all.total, result.missing) == (1, 3, ["112A1", "112A3"])
    both = marks(exam, written(tmp_path, [("112A2", "b")]), written(tmp_path, [("113A1", "e")], "more.jsonl"))
    assert (both.result.all.correct, both.result.all.total) == (2, 6)


def test_unknown_and_repeated_ids_are_told(exam: Path, tmp_path: Path) -> None:
    first = written(tmp_path, [("112A1", "a"), ("112A1", "b"), ("112A99", "a"), ("x", "a"), ("112A2", "c")])
    second = written(tmp_path, [("112A2", "b")], "more.jsonl")
    result = marks(exam, first, second)
    assert (result.duplicate, result.unknown) == (["112A1", "112A2"], ["112A99", "x"])
    assert (result.result.correct_ids, result.result.all.total) == ({"112A1"}, 3)  # the first line counts


def test_only_letters_joined_by_commas_are_read_as_published(exam: Path, tmp_path: Path) -> None:
    told = [("112A1", "Ａ"), ("112A2", "答えはb"), ("112A3", "a, c"), ("112B1", ""), ("112B2", "a,d"), ("112B3", "26Torr")]
    result = marks(exam, written(tmp_path, told))
    assert result.result.correct_ids == {"112A1"}
    assert (result.blank, result.unreadable) == (["112B1"], ["112A2", "112A3", "112B3"])
    parsed = marks(exam, written(tmp_path, told), parse=True)
    assert parsed.result.correct_ids == {"112A1", "112A2", "112A3", "112B3"}
    assert (parsed.blank, parsed.unreadable) == (["112B1"], [])


def test_prohibited_choices_are_counted(exam: Path, tmp_path: Path) -> None:
    result = marks(exam, written(tmp_path, [(item, "e") for item in IDS if item != "112B3"]))
    assert result.result.all.prohibited == 8
    assert result.result.verdict.outcome == "failed"


def test_what_the_benchmark_leaves_out_is_not_counted(exam: Path, tmp_path: Path) -> None:
    benchmark = read_benchmark("igakuqa", ["exclude=[112A1]"], exam)
    result = score_files([written(tmp_path, [("112A1", "b"), ("112A2", "b")])], benchmark, Path("sources"))
    assert (result.result.all.correct, result.result.all.total, result.excluded) == (1, 2, ["112A1"])


def test_a_benchmark_without_sections_is_one(tmp_path: Path) -> None:
    benchmark = read_benchmark("sample", [])
    ids = [question["problem_id"] for question in map(json.loads, _sample_lines())]
    result = score_files([written(tmp_path, [(ids[0], "a")])], benchmark, Path("sources"))
    assert (result.result.all.total, len(result.missing)) == (len(ids), len(ids) - 1)


def _sample_lines() -> list[str]:
    from jmedlora.config.locate import bundled_file

    return bundled_file("sample/questions.jsonl").read_text(encoding="utf-8").splitlines()


def test_the_page_and_the_json(exam: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(score)
    file = written(tmp_path, [*RIGHT[:4], ("112A1", "b"), ("x", "a")])
    arguments = [str(file), "--benchmark", "igakuqa", "--data", str(exam)]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert told == marks(exam, file).as_dict()
    assert {"correct", "total", "accuracy", "points", "points_total", "prohibited"} < told.keys()
    page = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    for line in ("required sections", "verdict: failed (", "2 missing", "1 unknown", "1 duplicate", "小児科"):
        assert line in page


def test_a_prediction_may_be_a_list_of_letters(exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    lists = {"112A1": ["a"], "112A2": [], "112A3": ["c", " a"], "112B1": ["d", "x"], "112B3": ["26"]}
    path.write_text("".join(json.dumps({"problem_id": item, "prediction": answer}) + "\n" for item, answer in lists.items()))
    result = marks(exam, path)
    assert result.result.correct_ids == {"112A1", "112A3", "112B3"}
    assert (result.blank, result.unreadable) == (["112A2"], ["112B1"])


def test_tables_of_predictions(exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("problem_id;prediction\n112A1;a\n112A3;a,c\n", encoding="utf-8")
    assert marks(exam, path).result.correct_ids == {"112A1", "112A3"}
    path.write_text("id,answer\n112A1,a\n112A3,a\n", encoding="utf-8")
    with pytest.raises(BadInput) as bad:
        marks(exam, path)
    assert str(bad.value) == f"{path}:1: header: the columns id, answer; allowed: the columns problem_id, prediction"


@pytest.mark.parametrize(
    ("line", "key", "problem"),
    [
        ('{"problem_id": "112A1"}', "prediction", "missing"),
        ('{"prediction": "a"}', "problem_id", "missing"),
        ('{"problem_id": "", "prediction": "a"}', "problem_id", "'' is not allowed"),
        ('{"problem_id": 1, "prediction": "a"}', "problem_id", "1 is not allowed"),
        ('{"problem_id": "112A1", "prediction": null}', "prediction", "None is not allowed"),
        ('{"problem_id": "112A1", "prediction": ["a", 1]}', "prediction", "['a', 1] is not allowed"),
        ('{"problem_id": "112A1", "prediction": ["\\ud800"]}', "prediction", "is not valid Unicode text"),
        ('{"problem_id": "112A1", "prediction": "\\ud800"}', "prediction", "is not valid Unicode text"),
        ('{"problem_id": "112A1", "prediction": "a"', "", "not JSON"),
        ("17", "", "not an object"),
    ],
)
def test_bad_lines_are_faults(line: str, key: str, problem: str, exam: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"problem_id": "112A1", "prediction": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(BadInput) as bad:
        marks(exam, path)
    assert [(fault.where, fault.key) for fault in bad.value.faults] == [(f"{path}:2", key)]
    assert problem in bad.value.faults[0].problem


def test_files_without_an_answer_are_faults(exam: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(BadInput, match="no predictions"):
        marks(exam, tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match=r"none\.jsonl: cannot be read: No such file or directory; allowed"):
        marks(exam, tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match=f"^{tmp_path}: a folder; allowed: the files in it$"):
        marks(exam, tmp_path)
    with pytest.raises(BadInput, match="none of the 1 ids is one of benchmark igakuqa"):
        marks(exam, written(tmp_path, [("x", "a")]))
    with pytest.raises(
        BadInput, match=f"not here yet: benchmark igakuqa: .*; `jmedlora data fetch igakuqa --sources {tmp_path}` brings it"
    ):
        score_files([written(tmp_path, RIGHT)], read_benchmark("igakuqa", []), tmp_path)


def test_scoring_imports_no_heavy_library() -> None:
    modules = ["cli.score", "evaluation.metrics", "evaluation.exam", "evaluation.prediction_files", "data.benchmarks"]
    heavy = ["torch", "transformers", "datasets", "ray", "mlflow", "deepspeed", "peft"]
    code = f"import sys, {', '.join(f'jmedlora.{name}' for name in modules)}; print([name for name in {heavy} if name in sys.modules])"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


GOOD_LINES = st.builds(
    lambda item, text: json.dumps({"problem_id": item, "prediction": text}, ensure_ascii=False),
    st.sampled_from([*IDS, "112A9", "x"]),
    st.sampled_from(
        ["a", "b", "c", "d", "e", "a,c", "c,a", ["a", "c"], ["b"], [], "a, c", "", "26", "26.0", "答えはa", "f", "a,a", "\u2028", "\x85a"]
    ),
)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers(), min_size=1, max_size=2) | st.just({"a": 1})
BAD_LINES = st.one_of(
    st.sampled_from(
        ["17", "null", '"a"', "{", "}", '{"problem_id": "112A1", "prediction": "a"', "problem_id,prediction", "[" * 3000, "\x00"]
    ),
    st.sampled_from(['{"prediction": "a"}', '{"problem_id": "112A1"}', "{}", '{"problem_id": "\\ud800", "prediction": "a"}']),
    st.builds(lambda value: json.dumps({"problem_id": "112A1", "prediction": value}), VALUES),
    st.builds(lambda value: json.dumps({"problem_id": value, "prediction": "a"}), VALUES | st.just(" ")),
)
LINES = st.lists(st.tuples(st.booleans(), GOOD_LINES, BAD_LINES).map(lambda row: (row[0], row[1] if row[0] else row[2])), max_size=30)
ANSWERS = {"112A1": ["a"], "112A2": ["b"], "112A3": ["a,c", "c,a"], "112B1": ["d"], "112B2": ["a", "d"], "112B3": ["26", "26.0"]}


def expected_correct(rows: list[dict[str, Any]]) -> set[str]:
    """Counted anew from the rows alone: the first line of an id counts."""
    first: dict[str, str] = {}
    for row in rows:
        answer = row["prediction"]
        first.setdefault(row["problem_id"], answer if isinstance(answer, str) else ",".join(answer))
    return {item for item, text in first.items() if text in ANSWERS.get(item, ["e"] if item.startswith("113A") else [])}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, all_good=st.booleans(), ending=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_no_line_is_lost_or_miscounted(
    lines: list[tuple[bool, str]], all_good: bool, ending: str, exam: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if all_good:
        lines = [line for line in lines if line[0]]
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text("".join(text + ending for _, text in lines), encoding="utf-8", newline="")
    bad = [i for i, (is_good, _) in enumerate(lines) if not is_good]
    rows = [json.loads(text) for is_good, text in lines if is_good]
    known = [row["problem_id"] for row in rows if row["problem_id"] in IDS]
    if bad or not known:
        with pytest.raises(BadInput) as raised:
            marks(exam, path)
        faults = [str(fault) for fault in raised.value.faults]
        step = ending.count("\n")
        told = {i for i in bad if any(fault.startswith(f"{path}:{i * step + 1}:") for fault in faults)}
        assert told == set(bad) or "stopped after 20 faults" in faults[-1] or any("JSON list" in fault for fault in faults)
        return
    result = marks(exam, path)
    sections = {item[:4] for item in known}
    asked = [item for item in IDS if item[:4] in sections]
    assert result.result.correct_ids == expected_correct(rows)
    assert result.result.all.total == len(asked)
    assert result.missing == [item for item in asked if item not in known]
    counts = Counter(row["problem_id"] for row in rows)
    assert sorted(result.duplicate) == sorted(item for item, count in counts.items() if count > 1)
    assert set(result.unknown) == counts.keys() - set(IDS)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80), cut=st.integers(0, 60), place=st.integers(0, 200))
def test_damaged_files_are_read_or_refused(content: bytes, cut: int, place: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every row that is not told as a fault is among the predictions."""
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    whole = "".join(f'{{"problem_id": "{item}", "prediction": "あ,{text}"}}\n' for item, text in RIGHT).encode()
    path.write_bytes(whole[:place] + content + whole[place + cut :])
    faults: list[str] = []
    try:
        predictions = read_prediction_files([path])
    except BadInput as bad:
        faults = list(map(str, bad.faults))
    if faults:
        assert all(fault.startswith(str(path)) for fault in faults)
        return
    lines = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    rows = json.loads("\n".join(lines)) if lines[0].lstrip().startswith("[") else [json.loads(line) for line in lines]
    assert predictions.texts.keys() == {row["problem_id"] for row in rows}
