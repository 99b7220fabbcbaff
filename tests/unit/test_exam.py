from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from jmedlora.config.benchmark import ExamRules
from jmedlora.data.rows import Question, QuestionFacts
from jmedlora.evaluation.exam import mark_exam, section_letter, section_of

RULES = ExamRules(required_sections=["B", "E"], required_share=0.8, max_prohibited=3, pass_points={2018: 4})


def asked(problem_id: str, *gold: int, points: int = 1, year: int | None = 2018, **facts: object) -> Question:
    known = QuestionFacts(points=points, **facts)  # type: ignore[arg-type]
    return Question(problem_id, "どれか。", ("壊血病", "痛風", "夜盲症", "緑内障", "喘息"), gold or (0,), year, facts=known)


def test_all_or_nothing_whatever_the_order() -> None:
    questions = [asked("112A1", 0, 2), asked("112A2", 0, 2), asked("112A3", 0, 2), asked("112A4", 1)]
    result = mark_exam(questions, {"112A1": (2, 0), "112A2": (0,), "112A3": (0, 1, 2), "112A4": (1,)}, ExamRules())
    assert result.correct_ids == {"112A1", "112A4"}
    assert (result.all.correct, result.all.total) == (2, 4)


def test_missing_answers_are_wrong_and_counted() -> None:
    result = mark_exam([asked("112A1"), asked("112A2", points=3)], {"112A1": (0,)}, ExamRules())
    assert result.as_dict()["accuracy"] == 0.5
    assert (result.all.points, result.all.points_total) == (1, 4)


def test_questions_of_no_points_count_in_the_accuracy() -> None:
    result = mark_exam([asked("112A1", points=0)], {"112A1": (0,)}, ExamRules()).as_dict()
    assert (result["correct"], result["accuracy"], result["points"], result["points_total"], result["share"]) == (1, 1.0, 0, 0, None)


def test_each_accepted_answer_is_right() -> None:
    question = replace(asked("112B30", 0), alternatives=((3,),))
    assert [mark_exam([question], {"112B30": (i,)}, ExamRules()).all.correct for i in range(5)] == [1, 0, 0, 1, 0]
    assert mark_exam([question], {"112B30": (0, 3)}, ExamRules()).all.correct == 0


def test_numbers_are_compared_by_value() -> None:
    question = Question("112C66", "求めよ。", (), (), 2018, value="7.20")
    for value, correct in (("7.2", 1), ("7.20", 1), ("7.21", 0), ("720", 0)):
        assert mark_exam([question], {}, ExamRules(), {"112C66": Decimal(value)}).all.correct == correct
    assert mark_exam([question], {"112C66": ()}, ExamRules()).all.correct == 0


def test_some_questions_always_count() -> None:
    rules = ExamRules(always_correct=["116A71"])
    questions = [asked("116A71", 2, year=2022), asked("116A72", 2, year=2022)]
    assert mark_exam(questions, {"116A71": (0,), "116A72": (0,)}, rules).correct_ids == {"116A71"}
    assert mark_exam(questions, {}, rules).correct_ids == {"116A71"}


def test_prohibited_choices_are_counted_also_in_wrong_and_void_answers() -> None:
    questions = [asked("112A1", 0, prohibited=(3, 4)), asked("112A2", 0, prohibited=(3,)), asked("112A3", 3, prohibited=())]
    result = mark_exam(questions, {"112A1": (3, 4), "112A2": (3,), "112A3": (3,)}, ExamRules(always_correct=["112A2"]))
    assert result.all.prohibited == 3
    assert result.by_section["112A"].prohibited == 3


def test_too_many_prohibited_choices_fail() -> None:
    questions = [asked(f"112A{i}", 0, prohibited=(4,)) for i in range(1, 7)]
    for picked, outcome in ((3, "undecided"), (4, "failed")):
        chosen = {f"112A{i}": (4 if i <= picked else 0,) for i in range(1, 7)}
        verdict = mark_exam(questions, chosen, ExamRules(max_prohibited=3), not_asked=[]).verdict
        assert verdict.outcome == outcome
        assert verdict.reasons[0] == f"{picked} prohibited choices picked, at most 3 allowed"


def full_exam(right_required: int, right_others: int) -> tuple[list[Question], dict[str, tuple[int, ...]]]:
    required = [asked(f"112{'BE'[i % 2]}{i}", 0) for i in range(10)]
    others = [asked(f"112A{i}", 0) for i in range(10)]
    chosen = {question.problem_id: (0,) for question in [*required[:right_required], *others[:right_others]]}
    return [*required, *others], chosen


def outcome(right_required: int, right_others: int, rules: ExamRules = RULES) -> str:
    questions, chosen = full_exam(right_required, right_others)
    return mark_exam(questions, chosen, rules, not_asked=[]).verdict.outcome


def test_passing_takes_every_rule() -> None:
    assert outcome(8, 4) == "passed"
    assert outcome(7, 10) == "failed"
    assert outcome(10, 3) == "failed"


def test_a_year_without_a_mark_is_not_judged_by_points() -> None:
    without = RULES.model_copy(update={"pass_points": {2019: 4}})
    assert outcome(10, 10, without) == "undecided"
    assert outcome(10, 0, without) == "undecided"
    assert outcome(7, 10, without) == "failed"
    assert mark_exam(*full_exam(10, 10), without, not_asked=[]).verdict.reasons[-1] == "no pass mark for 2018"


def test_without_rules_there_is_no_verdict() -> None:
    verdict = mark_exam(*full_exam(10, 10), ExamRules(), not_asked=[]).verdict
    assert (verdict.outcome, verdict.reasons) == ("undecided", ("no rule says what passes",))


def test_parts_of_an_exam_judge_only_what_cannot_change() -> None:
    questions, chosen = full_exam(0, 0)
    missing_b = [question for question in questions if section_letter(question) != "B"]
    rest = [question for question in questions if section_letter(question) == "B"]
    assert mark_exam(missing_b, chosen, RULES, not_asked=rest).verdict.outcome == "failed"  # the other sections are complete
    without_mark = RULES.model_copy(update={"pass_points": {}})
    assert mark_exam(missing_b, chosen, without_mark, not_asked=rest).verdict.outcome == "undecided"
    assert mark_exam(questions, chosen, RULES).verdict.outcome == "undecided"  # nobody knows whether there is more
    _, all_right = full_exam(10, 10)
    assert mark_exam(missing_b, all_right, RULES, not_asked=rest).verdict.outcome == "undecided"


def test_several_years_are_judged_apart() -> None:
    questions, chosen = full_exam(8, 4)
    later = [replace(q, problem_id=q.problem_id.replace("112", "113"), year=2019) for q in questions]
    rules = RULES.model_copy(update={"pass_points": {2018: 4, 2019: 4}})
    result = mark_exam([*questions, *later], chosen, rules, not_asked=[])
    assert [(sitting.year, sitting.verdict.outcome) for sitting in result.sittings] == [(2018, "passed"), (2019, "failed")]
    assert (result.verdict.outcome, result.verdict.reasons) == ("failed", ("2018: passed", "2019: failed"))
    assert result.as_dict()["by_year"]["2018"]["required"]["points"] == 8


def test_breakdowns() -> None:
    questions = [
        asked("112A1", 0, category="小児科"),
        replace(asked("112B1", 0, category="小児科"), text_only=False),
        asked("113A1", 0, year=2019, points=3),
    ]
    told = mark_exam(questions, {"112A1": (0,), "113A1": (0,)}, ExamRules()).as_dict()
    assert {key: (row["correct"], row["total"]) for key, row in told["by_section"].items()} == {
        "112A": (1, 1),
        "112B": (0, 1),
        "113A": (1, 1),
    }
    assert {key: row["points"] for key, row in told["by_year"].items()} == {"2018": 1, "2019": 3}
    assert {key: row["total"] for key, row in told["by_category"].items()} == {"小児科": 2}
    assert {key: row["total"] for key, row in told["by_text_only"].items()} == {"text only": 2, "with pictures": 1}


def test_agreement_with_people() -> None:
    shares = [0.9, 0.8, 0.3, None]
    questions = [asked(f"112A{i}", 0, human_accuracy=share) for i, share in enumerate(shares)]
    human = mark_exam(questions, {"112A0": (0,), "112A1": (0,), "112A3": (0,)}, ExamRules()).human
    assert (human.questions, human.when_right, human.when_wrong) == (3, (0.9 + 0.8) / 2, 0.3)
    assert mark_exam([asked("112A1")], {}, ExamRules()).human.when_right is None


def test_sections() -> None:
    assert (section_of(asked("112A1")), section_letter(asked("112A1"))) == ("112A", "A")
    own = asked("107_64-0", section="C")
    assert (section_of(own), section_letter(own)) == ("C", "C")
    assert (section_of(asked("1")), section_letter(asked("1"))) == ("", "")


@given(
    data=st.lists(
        st.tuples(
            st.sampled_from("ABCDEF"),
            st.sets(st.integers(0, 4), min_size=1),
            st.sets(st.integers(0, 4)),
            st.integers(0, 3),
            st.sets(st.integers(0, 4)),
            st.sampled_from([2018, 2019, None]),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_breakdowns_add_up(data: list[tuple[str, set[int], set[int], int, set[int], int | None]]) -> None:
    questions = [
        asked(f"112{section}{i}", *sorted(gold), points=points, year=year, prohibited=tuple(sorted(prohibited)))
        for i, (section, gold, _, points, prohibited, year) in enumerate(data)
    ]
    chosen = {question.problem_id: tuple(row[2]) for question, row in zip(questions, data)}
    result = mark_exam(questions, chosen, RULES)
    for parts in (list(result.by_section.values()), [sitting.all for sitting in result.sittings], list(result.by_text_only.values())):
        for name in ("correct", "total", "points", "points_total", "prohibited"):
            assert sum(getattr(part, name) for part in parts) == getattr(result.all, name)
    assert result.all.correct == sum(gold == picked for _, gold, picked, *_ in data)
