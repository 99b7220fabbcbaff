"""Benchmarks: filters, samples, examples, shuffling, places, and the real exam's counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmedlora.cli.data import describe_benchmark, read_benchmark
from jmedlora.config.benchmark import BenchmarkConfig, Filters, SampleFilter
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import NamedSource
from jmedlora.data.benchmarks import load_benchmark, read_all_questions
from jmedlora.data.files import NotHereYet
from jmedlora.data.rows import Question, QuestionFacts
from jmedlora.data.selection import select, shuffle_choices
from tests.exams import QUESTION, checkout, faults_of, ids, load, write, write_csv

# ---------------------------------------------------------------- filters


def test_filters_keep_what_they_say(tmp_path: Path) -> None:
    rows = [
        {
            **QUESTION,
            "problem_id": f"{exam}{'AB'[i % 2]}{i}",
            "text_only": i % 2 == 0,
            "choices": ["甲", "乙", "丙"][: 2 + (i > 2)],
            "answer": ["a", "b"][: 1 + (i > 3)],
            "category": "眼科" if i == 1 else "産科",
        }
        for exam in (112, 113)
        for i in range(1, 6)
    ]
    path = write(tmp_path / "q.jsonl", rows)

    def kept(**filters: Any) -> list[str]:
        return ids(load(path, filters=filters).questions)

    assert kept() == [row["problem_id"] for row in rows]
    assert kept(years=[2019]) == ["113B1", "113A2", "113B3", "113A4", "113B5"]
    assert kept(sections=["A"]) == kept(text_only=True) == ["112A2", "112A4", "113A2", "113A4"]
    assert kept(categories=["眼科"]) == ["112B1", "113B1"]
    assert kept(choices=2) == ["112B1", "112A2", "113B1", "113A2"]
    assert kept(answers=2, first=3) == ["112A4", "112B5", "113A4"]
    assert kept(items=["113A4", "112B1"]) == ["112B1", "113A4"]
    assert kept(exclude=["112B1"], first=1) == ["112A2"]
    assert faults_of(path, filters={"years": [1999], "sections": ["F"], "categories": ["x"]}) == [
        f"{path}: filters.years: 1999 is not here; allowed: one of 2018, 2019",
        f"{path}: filters.sections: F is not here; allowed: one of A, B",
        f"{path}: filters.categories: x is not here; allowed: one of 産科, 眼科",
    ]
    assert faults_of(path, filters={"items": ["112B1"], "choices": 3}) == [
        f'{path}: filters.items: ["112B1"] keeps none of 6 questions; allowed: one of 112A4, 112B3, 112B5, 113A4, 113B3, 113B5'
    ]
    assert faults_of(path, filters={"years": [2019], "choices": 5, "answers": 4, "sample": {"n": 3}}) == [
        f"{path}: filters.choices: 5 keeps none of 5 questions; allowed: one of 2, 3"
    ]
    assert faults_of(path, filters={"choices": 2, "answers": 2}) == [f"{path}: filters.answers: 2 keeps none of 4 questions; allowed: 1"]
    everything = [row["problem_id"] for row in rows]
    assert faults_of(path, filters={"exclude": everything}) == [f"{path}: filters.exclude: leaves none of 10 questions; allowed: fewer ids"]
    assert faults_of(path, fewshot_items=everything)[0] == f"{path}: fewshot_items: leaves none of 10 questions; allowed: fewer ids"
    assert faults_of(path, filters={"items": ["9"], "exclude": ["8"]})[:2] == [
        f"{path}: filters.items: no question 9; allowed: ids of questions that are here",
        f"{path}: filters.exclude: no question 8; allowed: ids of questions that are here",
    ]
    assert faults_of(path, filters={"first": 4, "sample": {"n": 5}}) == [f"{path}: filters.sample.n: 5 of 4 questions; allowed: at most 4"]


def test_an_unknown_id_is_told_also_where_years_are_left_out(tmp_path: Path) -> None:
    path = checkout(tmp_path)
    assert ids(load(path, filters={"years": [2018], "exclude": ["113A1"]}).questions) == ["112A1", "112A2", "112B1", "112B2"]
    assert "no question 113A9" in faults_of(path, filters={"years": [2018], "exclude": ["113A9"]})[0]


def asked(n: int, start: int = 0) -> list[Question]:
    return [Question(f"q{i}", f"text {i}", ("a", "b"), (0,)) for i in range(start, start + n)]


def sampled(questions: list[Question], n: int, seed: int = 0) -> list[str]:
    faults: list[Fault] = []
    kept = select(questions, Filters(sample=SampleFilter(n=n, seed=seed)), "x", faults)
    assert not faults
    return ids(kept)


def test_a_sample_is_the_same_everywhere_and_for_ever() -> None:
    assert sampled(asked(20), 5) == ["q11", "q12", "q13", "q17", "q18"]
    assert sampled(asked(20), 5, seed=1) != sampled(asked(20), 5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31), st.data())
def test_a_sample_keeps_the_order_and_grows_by_adding(size: int, more: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, size))
    questions = asked(size)
    taken = sampled(questions, n, seed)
    assert len(taken) == n
    assert taken == [item for item in ids(questions) if item in taken]
    # other questions push some out, but reshuffle nothing: whoever stays would have been taken without them
    assert set(sampled(asked(size + more), n, seed)) & set(ids(questions)) <= set(taken)
    assert set(sampled(questions, max(1, n - 1), seed)) <= set(taken)


# ---------------------------------------------------------------- examples


def test_examples_never_come_from_the_evaluated_questions(tmp_path: Path) -> None:
    rows = [{**QUESTION, "problem_id": f"115A{i}", "problem_text": f"問い{i}"} for i in range(1, 4)]
    path = write(tmp_path / "q.jsonl", rows)
    named = load(path, fewshot_items=["115A2"])
    assert (ids(named.examples), ids(named.questions)) == (["115A2"], ["115A1", "115A3"])
    allowed = "allowed: examples from outside the evaluated questions (or leave the question out by filters.exclude)"
    examples = write(tmp_path / "f.jsonl", rows[:1])
    assert faults_of(path, fewshot=str(examples)) == [f"{path}: fewshot: example 115A1 is also evaluated; {allowed}"]
    write(examples, [{**rows[0], "problem_id": "other", "problem_text": " 問い3 "}])
    assert faults_of(path, fewshot=str(examples)) == [f"{path}: fewshot: an example has the text of 115A3, which is evaluated; {allowed}"]
    assert ids(load(path, fewshot=str(examples), filters={"exclude": ["115A3"]}).examples) == ["other"]
    assert "no question 999" in faults_of(path, fewshot_items=["999"])[0]
    assert "115A1 twice" in faults_of(path, fewshot_items=["115A1", "115A1"])[0]


def test_named_examples_are_taken_out_before_questions_are_counted_off(tmp_path: Path) -> None:
    rows = [{**QUESTION, "problem_id": f"115A{i}", "problem_text": "同じ" if i in (1, 4) else f"問い{i}"} for i in range(1, 7)]
    path = write(tmp_path / "q.jsonl", rows)
    # 115A4 has the text of the example, so it is not evaluated either
    assert ids(load(path, fewshot_items=["115A1"], filters={"first": 3}).questions) == ["115A2", "115A3", "115A5"]
    outside = load(path, fewshot_items=["115A1"], filters={"items": ["115A2"]})
    assert (ids(outside.questions), ids(outside.examples)) == (["115A2"], ["115A1"])
    assert "at most 4" in faults_of(path, fewshot_items=["115A1"], filters={"sample": {"n": 5}})[0]


def test_an_example_without_choices_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "problem_id": "115A2", "problem_text": "いくつか", "choices": [], "answer": ["3"]}]
    )
    assert f"{path}:2: choices: no choices to choose from" in faults_of(path, fewshot_items=["115A2"])[0]


def test_examples_are_named_in_one_way(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION])
    for other in ({"fewshot": str(path)}, {"fewshot_bundled": "sample/fewshot.jsonl"}):
        with pytest.raises(BadInput, match=f"benchmark x: fewshot_items: given together with {next(iter(other))}"):
            load(path, fewshot_items=["115A1"], **other)


@pytest.mark.parametrize(("place", "count"), [("", 8), ("data", 8), ("data/2018", 4), ("data/2018/112-B.jsonl", 2)])
def test_a_checkouts_own_examples_are_found_from_every_place_in_it(tmp_path: Path, place: str, count: int) -> None:
    loaded = load(checkout(tmp_path) / place)
    assert (len(loaded.questions), ids(loaded.examples)) == (count, ["100E5"])


def test_a_file_elsewhere_has_no_examples_of_a_checkout_above_it(tmp_path: Path) -> None:
    checkout(tmp_path)
    assert load(write(tmp_path / "mine/q.jsonl", [QUESTION])).examples == []


# ---------------------------------------------------------------- shuffling


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 10), st.integers(0, 2**31), st.data())
def test_shuffled_choices_keep_their_meaning(size: int, seed: int, data: st.DataObject) -> None:
    positions = st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=3).map(lambda found: tuple(sorted(found)))
    facts = QuestionFacts(prohibited=data.draw(positions), choices_en=tuple(f"en{i}" for i in range(size)))
    question = Question(
        "1", "x", tuple(f"c{i}" for i in range(size)), data.draw(positions), alternatives=(data.draw(positions),), facts=facts
    )
    moved = shuffle_choices(question, seed)
    assert sorted(moved.choices) == sorted(question.choices)
    for before, after in [
        (question.gold, moved.gold),
        (question.alternatives[0], moved.alternatives[0]),
        (facts.prohibited, moved.facts.prohibited),
    ]:
        assert {question.choices[i] for i in before} == {moved.choices[i] for i in after}
        assert list(after) == sorted(after)
    assert [text.replace("en", "c") for text in moved.facts.choices_en] == list(moved.choices)
    assert moved == shuffle_choices(question, seed)


def test_shuffling_is_asked_for_by_the_configuration_and_leaves_examples_alone(tmp_path: Path) -> None:
    choices = [f"c{i}" for i in range(8)]
    rows = [{**QUESTION, "problem_id": str(i), "problem_text": f"問い{i}", "choices": choices} for i in range(6)]
    path = write(tmp_path / "q.jsonl", rows)
    plain, shuffled = load(path, fewshot_items=["0"]), load(path, fewshot_items=["0"], shuffle=3)
    assert shuffled.examples == plain.examples
    assert [question.answer for question in shuffled.questions] == [question.answer for question in plain.questions]
    assert len({question.choices for question in shuffled.questions}) == 5  # an order for each question
    assert len({load(path, fewshot_items=["0"], shuffle=seed).digest for seed in range(4)} | {plain.digest}) == 5


# ---------------------------------------------------------------- places


def test_a_source_that_is_not_here_says_how_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotHereYet) as absent:
        load_benchmark(read_benchmark("igakuqa", []), tmp_path)
    told = f"`jmedlora data fetch igakuqa --sources {tmp_path}` brings it"
    assert str(absent.value) == f"benchmark igakuqa: {tmp_path}/benchmarks/igakuqa; {told}"
    monkeypatch.chdir(tmp_path)
    for usual in (Path("sources"), tmp_path / "sources"):
        with pytest.raises(NotHereYet, match=r"; `jmedlora data fetch igakuqa` brings it$"):
            load_benchmark(read_benchmark("igakuqa", []), usual)
    with pytest.raises(NotHereYet, match=r"`jmedlora data fetch igakuqa --sources 'my sources'` brings it$"):
        load_benchmark(read_benchmark("igakuqa", []), Path("my sources"))
    mine = BenchmarkConfig(name="mine", source=NamedSource(kind="named", name="mine.jsonl"))
    with pytest.raises(NotHereYet, match=r"benchmark mine: .*/benchmarks/mine.jsonl$"):
        load_benchmark(mine, tmp_path)
    write(tmp_path / "benchmarks/mine.jsonl", [QUESTION])
    assert len(load_benchmark(mine, tmp_path).questions) == 1


def test_an_empty_or_wrong_place_is_told(tmp_path: Path) -> None:
    assert "no questions" in faults_of(write(tmp_path / "q.jsonl", []))[0]
    (tmp_path / "empty").mkdir()
    assert "no question files in this folder" in faults_of(tmp_path / "empty")[0]
    assert "does not exist" in faults_of(tmp_path / "nowhere")[0]


# ---------------------------------------------------------------- the real exam

EXAMS = {
    2018: (286, 284, 239, (336, 56, 8), 2, 499),
    2019: (296, 292, 248, (342, 52, 6), 2, 496),
    2020: (287, 284, 242, (344, 40, 16), 3, 496),
    2021: (301, 298, 253, (341, 51, 8), 2, 500),
}


def test_the_real_exam_has_the_published_counts(shared_data: Path) -> None:
    facts = describe_benchmark(read_benchmark("igakuqa", [], data=shared_data / "igakuqa"), Path())
    for year, expected in EXAMS.items():
        counts = facts["source"]["years"][year]
        answers = tuple(counts["answers"][n] for n in (1, 2, 3))
        names = ("text_only", "text_only_five_choices", "text_only_five_choices_one_answer")
        assert (*(counts[name] for name in names), answers, counts["numeric"], counts["points"]) == expected
        assert counts["questions"] == counts["translated"] == 400
    assert len(facts["source"]["categories"]) == 28
    assert facts["evaluated"]["questions"] == 1158
    assert facts["examples"] == ["100E5", "100A60", "100A1"]


def test_the_real_exams_odd_questions(shared_data: Path) -> None:
    config = read_benchmark("igakuqa", [], data=shared_data / "igakuqa")
    by_id = {question.problem_id: question for question in read_all_questions(config, Path())}
    assert len(by_id) == 1600
    assert {item: len(by_id[item].choices) for item in ("113C66", "113F83", "115D75")} == {"113C66": 6, "113F83": 8, "115D75": 8}
    assert [item for item, question in by_id.items() if not all(question.choices)] == ["114C11"]
    assert (by_id["112C66"].value, by_id["113F84"].value) == ("26", "7.20")
    assert (by_id["112B30"].gold, by_id["112B30"].alternatives) == ((0,), ((3,),))
    assert by_id["112A27"].facts.prohibited == (2, 3, 4)
    assert by_id["112A1"].facts.human_accuracy == pytest.approx(0.393)
    assert all(0 <= question.facts.human_accuracy <= 1 for question in by_id.values() if question.facts.human_accuracy is not None)


def test_the_real_exam_is_found_from_every_place_in_its_checkout(shared_data: Path) -> None:
    whole = load(shared_data / "igakuqa", filters={"years": [2021], "text_only": True, "choices": 5})
    for place in ("data", "data/2021"):
        assert load(shared_data / "igakuqa" / place, filters={"years": [2021], "text_only": True, "choices": 5}) == whole
    section = load(shared_data / "igakuqa/data/2021/115-A.jsonl", filters={"text_only": True, "choices": 5})
    assert set(ids(section.questions)) < set(ids(whole.questions))
    assert section.examples == whole.examples


def test_the_real_self_assessment_questions_have_the_published_counts(shared_data: Path) -> None:
    path = shared_data / "jjsimqa/jjsimqa.jsonl"
    facts = describe_benchmark(read_benchmark("jjsimqa", [], data=path), Path())
    # 107_888-26 asks for two and lists ["d", ",", "e"]: three entries, two letters
    listed = [
        len(row["answer"]) for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["problem_id"] != "107_64-4"
    ]
    assert [listed.count(n) for n in (1, 2, 3)] == [216, 174, 1]
    assert facts["evaluated"]["answers"] == {1: 216, 2: 175}
    assert facts["evaluated"]["questions"] == 391
    assert facts["notes"] == [
        f"{path}:27: answer: ['d', ',', 'e'] is read as d, e",
        f"{path}:58: choices: b is the same as a",
        f"{path}:270: choices: e is the same as d",
    ]


def test_the_real_self_assessment_questions_as_csv(shared_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "jjsimqa/jjsimqa.jsonl").read_text(encoding="utf-8").split("\n") if line]
    header = ["problem_id", "problem_text", "choices", "text_only", "answer", "points"]
    cells = [[*(str(row[key]) for key in header[:2]), row["choices_orig"], "True", "".join(row["answer"]), "1.0"] for row in rows]
    read = load(write_csv(tmp_path / "jjsimqa.csv", header, *cells))
    assert read == load(shared_data / "jjsimqa/jjsimqa.jsonl")
