"""How the exam itself marks a candidate: points, required sections, prohibited choices, pass or fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import fsum
from typing import Any, Literal

from jmedlora.config.benchmark import ExamRules
from jmedlora.data.questions import NUMBERED
from jmedlora.data.rows import Question
from jmedlora.evaluation.letters import exact_value


@dataclass(frozen=True)
class Tally:
    """Sums over some questions; `prohibited` counts picked choices, not questions."""

    correct: int
    total: int
    points: int
    points_total: int
    prohibited: int

    def as_dict(self) -> dict[str, Any]:
        """`accuracy` is the share of questions, `share` that of points; null where there are none."""
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": _share(self.correct, self.total),
            "points": self.points,
            "points_total": self.points_total,
            "share": _share(self.points, self.points_total),
            "prohibited": self.prohibited,
        }


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate passes; `reasons` tell what each rule says, and what keeps a rule from judging."""

    outcome: Literal["passed", "failed", "undecided"]
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Sitting:
    """The exam of one year (None where questions have no year)."""

    year: int | None
    all: Tally
    required: Tally
    verdict: Verdict


@dataclass(frozen=True)
class HumanAgreement:
    """Mean share of candidates who were right, over the questions answered rightly and wrongly here; None where there are none."""

    questions: int
    when_right: float | None
    when_wrong: float | None


@dataclass(frozen=True)
class ExamResult:
    """Marks of one system; the breakdowns leave out questions of which the year, section or category is not known."""

    all: Tally
    required: Tally
    sittings: tuple[Sitting, ...]
    by_section: dict[str, Tally]
    by_category: dict[str, Tally]
    by_text_only: dict[str, Tally]
    verdict: Verdict
    human: HumanAgreement
    correct_ids: frozenset[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON's types: the sums at the top, then breakdowns, required sections, verdict and agreement with people."""
        years = {
            str(sitting.year): {**sitting.all.as_dict(), "required": sitting.required.as_dict(), "verdict": sitting.verdict.as_dict()}
            for sitting in self.sittings
            if sitting.year is not None
        }
        return {
            **self.all.as_dict(),
            "by_year": years,
            "by_section": {key: tally.as_dict() for key, tally in self.by_section.items()},
            "by_category": {key: tally.as_dict() for key, tally in self.by_category.items()},
            "by_text_only": {key: tally.as_dict() for key, tally in self.by_text_only.items()},
            "required": self.required.as_dict(),
            "verdict": self.verdict.as_dict(),
            "human_accuracy": {
                "questions": self.human.questions,
                "when_right": self.human.when_right,
                "when_wrong": self.human.when_wrong,
            },
        }


def mark_exam(
    questions: Sequence[Question],
    chosen: Mapping[str, Sequence[int]],
    rules: ExamRules,
    values: Mapping[str, Decimal] | None = None,
    not_asked: Iterable[Question] | None = None,
) -> ExamResult:
    """Mark answers as the exam does: all or nothing, on the chosen positions regardless of their order.

    questions: all that were to be answered; those without an answer are wrong and stay in every denominator.
    chosen: positions in the choices by problem_id; values: numbers, for questions without choices.
    rules: a question of `always_correct` counts whatever was answered, also where nothing was.
    not_asked: the rest of these exams. None where it is not known whether there is a rest: points then judge nobody.
    """
    values = values or {}
    correct = frozenset(q.problem_id for q in questions if q.problem_id in rules.always_correct or is_right(q, chosen, values))

    def tally(some: Iterable[Question]) -> Tally:
        own = list(some)
        right = [question for question in own if question.problem_id in correct]
        return Tally(
            correct=len(right),
            total=len(own),
            points=sum(question.facts.points for question in right),
            points_total=sum(question.facts.points for question in own),
            prohibited=sum(len(set(chosen.get(question.problem_id, ())) & set(question.facts.prohibited)) for question in own),
        )

    rest = None if not_asked is None else list(not_asked)
    sittings = []
    for year in sorted({question.year for question in questions}, key=lambda year: (year is None, year)):
        own = [question for question in questions if question.year == year]
        required = tally(q for q in own if section_letter(q) in rules.required_sections)
        others = tally(q for q in own if section_letter(q) not in rules.required_sections)
        absent = None if rest is None else [question for question in rest if question.year == year]
        whole = tally(own)
        sittings.append(Sitting(year, whole, required, _judge(year, whole, required, others, rules, absent)))
    return ExamResult(
        all=tally(questions),
        required=tally(q for q in questions if section_letter(q) in rules.required_sections),
        sittings=tuple(sittings),
        by_section=_grouped(questions, section_of, tally),
        by_category=_grouped(questions, lambda question: question.facts.category, tally),
        by_text_only=_grouped(questions, lambda question: "text only" if question.text_only else "with pictures", tally),
        verdict=_combined(sittings),
        human=_human_agreement(questions, correct),
        correct_ids=correct,
    )


def is_right(question: Question, chosen: Mapping[str, Sequence[int]], values: Mapping[str, Decimal]) -> bool:
    """Whether an answer is one that the exam accepts; numbers are compared by value (7.2 is 7.20)."""
    if question.gold:
        return tuple(sorted(chosen.get(question.problem_id, ()))) in (question.gold, *question.alternatives)
    value = exact_value(question.value)
    return value is not None and values.get(question.problem_id) == value


def section_of(question: Question) -> str:
    """Exam number and section, such as 112A, where the id tells; else the section alone, or an empty text."""
    found = NUMBERED.fullmatch(question.problem_id)
    return found.group(1) + found.group(2) if found else question.facts.section


def section_letter(question: Question) -> str:
    """Letter of the exam's section, or an empty text."""
    found = NUMBERED.fullmatch(question.problem_id)
    return question.facts.section or (found.group(2) if found else "")


# ---------------------------------------------------------------- passing


def _judge(year: int | None, whole: Tally, required: Tally, others: Tally, rules: ExamRules, absent: Sequence[Question] | None) -> Verdict:
    """What the rules say of one year; one rule that is broken fails, and passing takes all of them."""
    if rules.max_prohibited is None and rules.required_share is None and not rules.pass_points:
        return Verdict("undecided", ("no rule says what passes",))
    findings: list[tuple[bool | None, str]] = []
    if rules.max_prohibited is not None:
        told = f"{whole.prohibited} prohibited choices picked, at most {rules.max_prohibited} allowed"
        within = whole.prohibited <= rules.max_prohibited
        # more may be picked in what was not asked
        findings.append((None if within and absent != [] else within, told))
    sections = [name for name in rules.required_sections if absent is None or any(section_letter(q) == name for q in absent)]
    if rules.required_share is not None and rules.required_sections:
        told = f"{required.points} of {required.points_total} points in required sections {', '.join(rules.required_sections)}"
        asked = f"{rules.required_share:.0%} asked"
        if sections or not required.points_total:
            findings.append((None, f"{told}: not judged, since they were not asked in full"))
        else:
            findings.append((required.points >= _exactly(rules.required_share) * required.points_total, f"{told}, {asked}"))
    mark = rules.pass_points.get(year) if year is not None else None
    if mark is None:
        findings.append((None, f"no pass mark for {year}" if year is not None else "no pass mark"))
    else:
        told = f"{others.points} points in the other sections, {mark:g} asked"
        reached = others.points >= mark
        complete = absent is not None and all(section_letter(q) in rules.required_sections for q in absent)
        findings.append((reached if reached or complete else None, told if reached or complete else f"{told}: not asked in full"))
    outcome: Literal["passed", "failed", "undecided"] = "passed"
    if any(finding is False for finding, _ in findings):
        outcome = "failed"
    elif any(finding is None for finding, _ in findings):
        outcome = "undecided"
    return Verdict(outcome, tuple(told for _, told in findings))


def _exactly(share: float) -> Decimal:
    """The share as it was written: 0.8 of 50 points is 40, which binary fractions may miss by a hair."""
    return Decimal(str(share))


def _combined(sittings: Sequence[Sitting]) -> Verdict:
    """Over several years: failed where one is, passed where all are."""
    if len(sittings) == 1:
        return sittings[0].verdict
    outcomes = [sitting.verdict.outcome for sitting in sittings]
    reasons = tuple(f"{sitting.year or 'no year'}: {sitting.verdict.outcome}" for sitting in sittings)
    if "failed" in outcomes:
        return Verdict("failed", reasons)
    return Verdict("undecided" if "undecided" in outcomes or not outcomes else "passed", reasons)


# ---------------------------------------------------------------- sums


def _grouped(
    questions: Sequence[Question], key: Callable[[Question], str], tally: Callable[[Iterable[Question]], Tally]
) -> dict[str, Tally]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        if name := key(question):
            groups.setdefault(name, []).append(question)
    return {name: tally(own) for name, own in sorted(groups.items())}


def _human_agreement(questions: Sequence[Question], correct: frozenset[str]) -> HumanAgreement:
    known = [(q.facts.human_accuracy, q.problem_id in correct) for q in questions if q.facts.human_accuracy is not None]
    return HumanAgreement(len(known), _mean([share for share, is_correct in known if is_correct]), _mean([s for s, c in known if not c]))


def _mean(shares: Sequence[float]) -> float | None:
    return fsum(shares) / len(shares) if shares else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
