"""Benchmark questions among training rows: what is found, what is not, what is remembered, what is refused."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from jmedlora.cli.check import check
from jmedlora.config.benchmark import BenchmarkConfig, Filters
from jmedlora.config.compose import load_sweep
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.contamination import Leak, LeakSettings, find_leaks, normalise
from jmedlora.data.instructions import load_instructions
from jmedlora.data.ngrams import build_index, find_candidates
from jmedlora.data.rows import LETTERS, Instruction, Question, QuestionFacts
from jmedlora.plan.leaks import check_sweep, is_small, leaks_in, leaks_of, refuse_leaks

CASE = Question(
    "T1",
    "68歳の女性。歩行時の息切れを主訴に来院した。3週前から階段を上ると息が切れるようになり、夜間に咳で目が覚める。"
    "脈拍96/分、整。両側の下肢に浮腫を認める。胸部の聴診で両側に水泡音を聴取する。最も考えられるのはどれか。",
    ("心不全", "気管支喘息", "肺血栓塞栓症", "間質性肺炎", "過換気症候群"),
    (0,),
    facts=QuestionFacts(
        question_en="A 68-year-old woman came to the clinic because of shortness of breath on walking. For three weeks she has been short "
        "of breath on climbing stairs, and coughing wakes her at night. Which of the following is most likely?",
        choices_en=("Heart failure", "Asthma", "Pulmonary embolism", "Interstitial pneumonia", "Hyperventilation"),
    ),
)
SHORT = Question("T2", "副腎皮質の球状層から分泌されるのはどれか。", ("アルドステロン", "コルチゾール", "アドレナリン", "インスリン"), (0,))
PLAIN = Question("T3", "糖尿病について正しいのはどれか。", ("口渇を伴う。", "男性だけにみられる。", "血糖が低下する。"), (0,))
SUBJECTS = ("慢性肺炎", "喘息", "痛風", "脚気", "麻疹", "風疹")
PHRASES = [
    Question(
        f"P{i}",
        f"{subject}で入院した高齢の患者について正しいのはどれか。",
        (f"{subject}薬を使う。", "隔離を要する。", "外科の対象となる。"),
        (1,),
    )
    for i, subject in enumerate(SUBJECTS)
]
ASKED = "この患者の病態を説明するために最初に行うべき検査として最も適切なのはどれか。"
BARE = Question("P9", "について正しいのはどれか。", ("脱水に注意する。", "安静を保つ。", "水分を制限する。"), (1,))
QUESTIONS = [CASE, SHORT, PLAIN]
FILLER = "この章では循環器の診察について述べる。問診では症状の経過を尋ね、視診と聴診を行う。"


def found(row: Instruction, questions: list[Question] = QUESTIONS) -> list[tuple[str, str]]:
    return [(leak.problem_id, leak.kind) for leak in find_leaks([row], questions)]


def joined(question: Question) -> str:
    return ",".join(question.choices)


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.problem_id)
def test_a_copy_is_found_with_its_answer(question: Question) -> None:
    [leak] = find_leaks([Instruction("別の行。", "", "答え。"), question.as_instruction()], QUESTIONS, benchmark="exam")
    assert leak.row == 1 and leak.problem_id == question.problem_id and leak.benchmark == "exam"
    assert leak.kind == "question and answer" and leak.similarity == 100 and leak.share == 1
    assert leak.overlap.startswith(normalise(question.text)[:20])


def test_full_width_forms_and_punctuation_do_not_hide_a_copy() -> None:
    wide = CASE.text.translate({code: code + 0xFEE0 for code in range(0x30, 0x3A)}).replace("。", " . ").replace("、", "，")
    assert wide != CASE.text
    [leak] = find_leaks([Instruction(wide, "", "わからない。")], QUESTIONS)
    assert (leak.problem_id, leak.kind, leak.similarity) == ("T1", "question", 100)


@pytest.mark.parametrize(
    "row",
    [
        Instruction(CASE.text.replace("息切れ", "呼吸困難"), "", "肺炎"),
        Instruction(SHORT.text.replace("球状層", "束状層"), joined(SHORT), "コルチゾール"),
        Instruction(SHORT.text.replace("副腎皮質の球状層から", "この腺から"), joined(SHORT), "アルドステロン"),
        Instruction(f"{FILLER * 20}例題：{CASE.text}{FILLER * 20}", "", FILLER),
        Instruction("例題を解いてください。", f"{FILLER}{SHORT.text} a. {' b. '.join(SHORT.choices)}", "aである。"),
        Instruction(CASE.text[:60], CASE.text[60:] + joined(CASE), "心不全"),
        Instruction(SHORT.text, "\n".join(f"{i}. {choice}" for i, choice in enumerate(reversed(SHORT.choices))), "3"),
        Instruction(SHORT.text, "", "球状層からはアルドステロンが分泌される。"),
    ],
    ids=["word", "short word", "reworded", "embedded", "embedded short", "split", "other order", "answer in words"],
)
def test_changed_and_hidden_copies_are_found(row: Instruction) -> None:
    assert len(found(row)) == 1


def test_a_case_in_the_input_and_what_is_asked_in_the_instruction_are_one_question() -> None:
    question = Question("C1", f"{CASE.text[:90]}{ASKED}", CASE.choices, (0,))
    assert found(Instruction(ASKED, CASE.text[:90], "心電図"), [question]) == [("C1", "question")]


def test_choices_lead_to_a_short_question_whose_rare_words_were_changed() -> None:
    row = Instruction("長引いた肺の炎症で入院した高齢の患者について正しいのはどれか。", joined(PHRASES[0]), "隔離を要する。")
    assert found(row, PHRASES) == [("P0", "question and answer")]


def test_the_translation_is_looked_for_as_well() -> None:
    row = Instruction(f"Answer the question.\n{CASE.facts.question_en.upper()}", " / ".join(CASE.facts.choices_en), "Heart failure.")
    [leak] = find_leaks([row], QUESTIONS)
    assert (leak.problem_id, leak.language, leak.kind) == ("T1", "en", "question and answer")


def test_a_row_may_hold_several_questions_and_a_question_stand_in_several_rows() -> None:
    both = Instruction(f"{CASE.text}{joined(CASE)}", f"{SHORT.text}{joined(SHORT)}", "心不全、アルドステロン")
    leaks = find_leaks([both, SHORT.as_instruction()], QUESTIONS)
    assert [(leak.row, leak.problem_id) for leak in leaks] == [(0, "T1"), (0, "T2"), (1, "T2")]


def test_the_answer_of_a_question_without_choices_is_its_value() -> None:
    number = Question("N1", "体重60kg、身長2.0mの人のBMIを求めよ。", (), (), value="15")
    assert found(Instruction(number.text, "", "15"), [number]) == [("N1", "question and answer")]
    assert found(Instruction(number.text, "", "16"), [number]) == []
    unknown = Question("N2", CASE.text, (), ())
    assert found(Instruction(unknown.text, "", "…"), [unknown]) == [("N2", "question")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["", " ", "\n", "、", "。", "-", "　", "!"]), min_size=10, max_size=40), st.booleans())
def test_what_is_not_compared_never_matters(marks: list[str], decompose: bool) -> None:
    text = "".join(character + marks[i % len(marks)] for i, character in enumerate(SHORT.text))
    row = Instruction(unicodedata.normalize("NFKD", text) if decompose else text, joined(SHORT), SHORT.answer)
    [leak] = find_leaks([row], QUESTIONS)
    assert leak.problem_id == "T2" and leak.similarity == 100


# ---------------------------------------------------------------- what is none


@pytest.mark.parametrize(
    "row",
    [
        Instruction("副腎皮質の束状層から分泌されるのはどれか。", "成長ホルモン,コルチゾール,グルカゴン", "コルチゾール"),
        Instruction(SHORT.text, "", "わからない。"),
        Instruction(PLAIN.text, "網膜症を起こす。,若年者だけにみられる。", "網膜症を起こす。"),
        Instruction("糖尿病について説明してください。", "", "血糖が高い状態が続く病気で、口渇を伴う。"),
        Instruction("球状層から分泌されるホルモンは何ですか。", "", "副腎皮質の球状層からはアルドステロンが分泌される。"),
        Instruction("最も考えられるのはどれか。", joined(CASE), "心不全"),
        Instruction(CASE.text[: len(CASE.text) // 2] + FILLER * 3, "", "肺炎"),
        Instruction(CASE.text[:50], "", "肺炎"),
        Instruction("どれか。", "", "a"),
        Instruction("…", "", "…"),
    ],
    ids=[
        "other subject",
        "text alone",
        "other choices",
        "same subject",
        "same fact",
        "choices alone",
        "half",
        "beginning",
        "end",
        "nothing",
    ],
)
def test_other_rows_on_the_same_subject_are_no_leak(row: Instruction) -> None:
    assert found(row) == []


def test_phrases_of_the_exam_say_nothing_without_every_choice() -> None:
    questions = [*PHRASES, BARE]
    assert found(Instruction("腎炎について正しいのはどれか。", "蛋白尿を伴う。,安静を保つ。", "安静を保つ。"), questions) == []
    assert found(Instruction("腎炎について誤っているのはどれか。", joined(BARE), "安静を保つ。"), questions) == []
    assert found(Instruction("腎炎について正しいのはどれか。", joined(BARE), "安静を保つ。"), questions) == [("P9", "question and answer")]


def test_the_same_stem_with_another_subject_is_another_question_even_with_the_same_answer() -> None:
    row = Instruction(PHRASES[0].text.replace("慢性肺炎", "慢性膵炎"), "隔離を要する。,断酒する。", "隔離を要する。")
    assert found(row, PHRASES) == []


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("アルドステロンとコルチゾールのうち電解質に働くのはどれか。", Instruction("", "", "前者である。")),
        ("一酸化炭素の中毒でまず投与するのはどれか。", Instruction("", "胃酸", "素手で触れない。")),
    ],
    ids=["in the question itself", "across two fields"],
)
def test_an_answer_counts_only_where_it_stands_by_itself(text: str, row: Instruction) -> None:
    question = Question("A1", text, ("酸素", "水素") if "酸" in text else ("アルドステロン", "コルチゾール"), (0,))
    assert found(Instruction(text, row.input, row.output), [question]) == []
    assert found(Instruction(text, row.input, question.answer), [question]) == [("A1", "question and answer")]


def test_the_numbers_1_to_5_are_no_choices_to_recognise_a_question_by() -> None:
    question = Question("I1", "矢印の部位で神経核はどれか。", ("1", "2", "3", "4", "5"), (2,))
    assert found(Instruction("矢印の部位で骨はどれか。", "1,2,3,4,5", "3"), [question]) == []
    assert found(question.as_instruction(), [question]) == [("I1", "question and answer")]


def test_the_sample_data_are_related_and_hold_no_leak() -> None:
    config = load_sweep("quickstart")
    [comparison] = check_sweep(config).compared
    assert comparison.rows > 40 and comparison.questions > 30
    assert comparison.leaks == [] and comparison.examples == []


def test_stricter_settings_find_less() -> None:
    row = Instruction(SHORT.text.replace("副腎皮質の球状層から", "この腺から"), joined(SHORT), "アルドステロン")
    assert find_leaks([row], QUESTIONS, LeakSettings(similarity_beside_choices=100)) == []
    assert find_leaks([], QUESTIONS) == find_leaks([row], []) == []


# ---------------------------------------------------------------- the index


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("あいうab", max_size=12), max_size=6),
    st.lists(st.text("あいうab", max_size=20), max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_the_index_finds_what_a_plain_search_finds(texts: list[str], rows: list[str], length: int, most: int) -> None:
    def ngrams(text: str) -> set[str]:
        return {text[i : i + length] for i in range(len(text) - length + 1)}

    spread = Counter(gram for text in texts for gram in ngrams(text))
    index = build_index(texts, length, most)
    answers = {(row, owner): share for row, owner, share in find_candidates(index, rows, 1e-9)}
    expected = {}
    for owner, text in enumerate(texts):
        rare = {gram for gram in ngrams(text) if spread[gram] <= most}
        assert index.common[owner] == (not rare)
        if len(rare) >= 3 or rare == ngrams(text):
            for row, asked in enumerate(rows):
                if hits := rare & ngrams(asked):
                    expected[row, owner] = len(hits) / len(rare)
        else:
            answers = {key: share for key, share in answers.items() if key[1] != owner}
            assert index.kept[owner] == min(3, len(ngrams(text)))
    assert answers == pytest.approx(expected)


# ---------------------------------------------------------------- real exams


def test_an_exam_leaks_wholly_into_itself_and_hardly_into_another_year(shared_data: Path) -> None:
    def year(*years: int) -> list[Question]:
        filters = Filters(years=list(years), text_only=True, choices=5)
        return load_benchmark(BenchmarkConfig(name="x", path=str(shared_data / "igakuqa"), filters=filters), shared_data).questions

    questions = year(2018)
    leaks = find_leaks([question.as_instruction() for question in questions], questions)
    assert {(questions[leak.row].problem_id, leak.problem_id) for leak in leaks} >= {(each.problem_id,) * 2 for each in questions}
    assert all(leak.kind == "question and answer" for leak in leaks if questions[leak.row].problem_id == leak.problem_id)
    later = year(2019, 2020, 2021)
    assert len(find_leaks([question.as_instruction() for question in questions], later)) <= 2
    assert find_leaks([question.as_instruction() for question in later[:300]], later[300:]) == []


# ---------------------------------------------------------------- sweeps


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def as_line(question: Question) -> dict[str, Any]:
    letters = [LETTERS[i] for i in question.gold]
    return {"problem_id": question.problem_id, "problem_text": question.text, "choices": list(question.choices), "answer": letters}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep whose data hold one of its questions, and one of its few-shot examples, after a blank line."""
    rows = [Instruction("循環器の診察とは。", "", FILLER), PLAIN.as_instruction(), SHORT.as_instruction()]
    lines = [json.dumps(row.as_dict(), ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    write(tmp_path / "clean.jsonl", [rows[0].as_dict()])
    write(tmp_path / "questions.jsonl", [as_line(CASE), as_line(SHORT)])
    write(tmp_path / "examples.jsonl", [as_line(PLAIN)])
    (tmp_path / "mine.yaml").write_text(
        """
grid: {model: [tiny-llama], method: [lora], rank: [4], epochs: [1], data: [{name: mine, path: rows.jsonl}]}
benchmarks: [{name: exam, path: questions.jsonl, fewshot: examples.jsonl}]
storage: results
sources: sources
""",
        encoding="utf-8",
    )
    return tmp_path / "mine.yaml"


def test_a_sweep_is_told_which_line_holds_which_question(sweep: Path) -> None:
    config = load_sweep(str(sweep))
    [comparison] = leaks_in(config)
    assert (comparison.data, comparison.benchmark, comparison.rows, comparison.questions) == ("mine", "exam", 3, 2)
    [leak] = comparison.leaks
    assert leak == Leak(2, f"{sweep.parent / 'rows.jsonl'}:5", "exam", "T2", "question and answer", "ja", 100, 1, normalise(SHORT.text))
    assert [leak.problem_id for leak in comparison.examples] == ["T3"]


def test_leaking_data_are_refused_in_one_line_unless_they_are_allowed(sweep: Path) -> None:
    with pytest.raises(BadInput) as caught:
        refuse_leaks(load_sweep(str(sweep)))
    assert str(caught.value) == (
        "data mine: 1 question of benchmark exam (T2) in 1 of 3 rows; allowed: other data, the benchmark's filters.exclude, or leaks: allow"
    )
    refuse_leaks(load_sweep(str(sweep), ["leaks=allow"]))
    refuse_leaks(load_sweep(str(sweep), ["benchmarks=[{name: exam, path: questions.jsonl, filters: {exclude: [T2]}}]"], sweep.parent))


def test_data_that_no_run_uses_are_not_compared(sweep: Path) -> None:
    clean = "grid.data=[{name: clean, path: clean.jsonl}]"
    config = load_sweep(str(sweep), ["data={name: mine, path: rows.jsonl}", clean], sweep.parent)
    assert set(config.data) == {"mine", "clean"}
    assert [comparison.data for comparison in check_sweep(config).compared] == ["clean"]


def test_bad_rows_are_told_before_anything_is_compared(sweep: Path) -> None:
    write(sweep.parent / "rows.jsonl", [{"instruction": "問い"}])
    write(sweep.parent / "questions.jsonl", [{"problem_id": "x"}])
    with pytest.raises(BadInput) as caught:
        check_sweep(load_sweep(str(sweep)))
    told = str(caught.value)
    assert "rows.jsonl:1: output: missing" in told and "questions.jsonl:1: problem_text: missing" in told


def test_a_verdict_is_computed_once_for_the_same_content(sweep: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = load_sweep(str(sweep))
    data = load_instructions(config.data["mine"], tmp_path)
    benchmark = load_benchmark(config.benchmarks[0], tmp_path)
    first = leaks_of(data, benchmark, cache)
    [file] = (cache / "leaks").iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["questions"][0]["overlap"] = "from the file"
    file.write_text(json.dumps(kept), encoding="utf-8")
    renamed = load_benchmark(config.benchmarks[0].model_copy(update={"name": "other"}), tmp_path)
    leaks, examples = leaks_of(data, renamed, cache)
    assert leaks[0].overlap == "from the file" and leaks[0].benchmark == "other" and len(examples) == 1
    assert leaks_of(data, benchmark, cache, LeakSettings(similarity=91)) == first
    write(tmp_path / "rows.jsonl", [SHORT.as_instruction().as_dict() | {"output": "コルチゾール"}])
    changed = load_instructions(DataConfig(name="mine", path=str(tmp_path / "rows.jsonl")), tmp_path)
    assert leaks_of(changed, benchmark, cache)[0][0].row == 0
    assert len(list((cache / "leaks").iterdir())) == 3
    for damaged in ("", "[]", '{"questions": []}'):
        file.write_text(damaged)
        assert leaks_of(data, benchmark, cache) == first


def test_small_means_that_a_command_may_compare_in_passing() -> None:
    assert is_small(2_000, 2_000) and not is_small(77_422, 1_455) and not is_small(77_422, 40)


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(check)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_names_the_pairs_and_ends_with_1(sweep: Path) -> None:
    told = run(str(sweep))
    assert told.exit_code == 1
    assert "rows.jsonl:5" in told.output and "T2" in told.output and "question and answer" in told.output
    assert "data mine, benchmark exam: 1 of 2 questions in 1 of 3 rows" in told.output
    assert "few-shot examples among the rows, which are not evaluated: T3" in told.output
    assert "benchmark exam: 1 short questions were looked for only together with their answer or choices" in told.output


def test_the_command_writes_every_leak(sweep: Path, tmp_path: Path) -> None:
    rows = [SHORT.as_instruction().as_dict()] * 60
    write(tmp_path / "rows.jsonl", rows)
    told = run(str(sweep), "--output", str(tmp_path / "leaks.jsonl"))
    assert "... and 10 more (--json or --output FILE gives all)" in told.output
    lines = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == list(range(60))
    assert lines[59]["where"] == f"{tmp_path / 'rows.jsonl'}:60" and lines[0]["data"] == "mine" and lines[0]["benchmark"] == "exam"
    answer = json.loads(run(str(sweep), "--json").output)
    assert answer["leaks"] == lines
    assert answer["compared"] == [
        {
            "data": "mine",
            "benchmark": "exam",
            "rows": 60,
            "questions": 2,
            "short_questions": 1,
            "leaked_questions": 1,
            "leaking_rows": 60,
            "examples": [],
        }
    ]


def test_a_clean_sweep_ends_with_0_and_tells_what_is_not_here(sweep: Path) -> None:
    write(sweep.parent / "rows.jsonl", [Instruction("循環器の診察とは。", "", FILLER).as_dict()])
    told = run(str(sweep), "benchmarks=[sample,jjsimqa]")
    assert told.exit_code == 0
    assert "0 of 40 questions" in told.output and "not here yet, not compared: benchmark jjsimqa" in told.output


def test_nothing_to_compare_is_no_clean_bill(sweep: Path) -> None:
    told = run(str(sweep), "benchmarks=[jjsimqa]")
    assert isinstance(told.exception, BadInput) and "nothing to compare: benchmark jjsimqa" in str(told.exception)


def test_a_place_for_the_leaks_that_cannot_be_is_told_before_anything_is_compared(sweep: Path) -> None:
    (sweep.parent / "file").write_text("kept")
    write(sweep.parent / "rows.jsonl", ["no row"])  # would be told once the comparison begins
    os.mkfifo(sweep.parent / "pipe")
    allowed = "; allowed: a file in a folder that is here and that you may write to"
    for place, told in [
        (sweep.parent, f"{sweep.parent} is a folder"),
        (sweep.parent / "new/leaks.jsonl", f"{sweep.parent}/new is no folder that is here"),
        (sweep.parent / "file/leaks.jsonl", f"{sweep.parent}/file is no folder that is here"),
        (sweep.parent / "pipe", f"{sweep.parent}/pipe is no file"),
    ]:
        refused = run(str(sweep), "--output", str(place)).exception
        assert isinstance(refused, BadInput)
        assert str(refused) == f"command line: --output: {told}{allowed}"
    assert not (sweep.parent / "new").exists() and (sweep.parent / "file").read_text() == "kept"


def test_a_file_that_cannot_be_written_after_all_is_told(sweep: Path) -> None:
    name = "x" * 250  # fits, but not with what is put beside a file until it is whole
    refused = run(str(sweep), "--output", str(sweep.parent / name)).exception
    assert isinstance(refused, BadInput) and "cannot be written: File name too long; allowed" in str(refused)
