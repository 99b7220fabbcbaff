"""Stored answers scored anew: when, with what, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jmedlora.config.benchmark import HARNESS_METRICS, BenchmarkConfig, ExamRules
from jmedlora.config.faults import BadInput
from jmedlora.data.rows import Question, QuestionFacts
from jmedlora.evaluation.rescoring import rescore_stored
from jmedlora.evaluation.results import Answers, write_results
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import EvaluationSpec, Plan
from jmedlora.report.writer import write_report
from tests.made_up import base_spec, evaluation_spec, plan_of

RULES = ExamRules(required_sections=["B"], required_share=0.8, max_prohibited=3)
QUESTIONS = [
    Question("115A1", "どれか。", ("痛風.", "喘息"), (0,), 2021, facts=QuestionFacts(3, "A", prohibited=(1,))),
    Question("115B1", "これは。", ("脚気", "壊血病"), (1,), 2021, text_only=False),
]
BASE = base_spec()


def asked(rules: ExamRules | None = RULES, **changes: Any) -> EvaluationSpec:
    spec = evaluation_spec(0, BenchmarkConfig(name="exam", bundled="sample/questions.jsonl", exam=rules))
    return spec.model_copy(update=changes)


def plan_with(evaluation: EvaluationSpec) -> Plan:
    return plan_of([BASE], [], [evaluation])


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path)
    facts = {"adapter_digest": None, "seconds": 2.5}
    write_results(storage, BASE.run_key, 0, asked(), QUESTIONS, Answers(["痛風\n", "壊血病\nである"], []), facts)
    return storage


def stored(storage: Storage) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = storage.run(BASE.run_key).evaluation(asked().folder, 0)
    lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return json.loads((folder / METRICS).read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_nothing_is_scored_twice_with_the_same_settings(storage: Storage) -> None:
    before = stored(storage)
    assert rescore_stored(plan_with(asked()), storage) == 0
    assert stored(storage) == before


def test_other_metric_settings_change_scores_and_keep_answers_and_facts(storage: Storage) -> None:
    before, rows = stored(storage)
    assert [row["exact_match"] for row in rows] == [False, True]
    assert rescore_stored(plan_with(asked(metrics=HARNESS_METRICS)), storage) == 1
    after, changed = stored(storage)
    assert [row["exact_match"] for row in changed] == [True, True]
    assert [row["prediction"] for row in changed] == [row["prediction"] for row in rows]
    assert (after["exact_match"], after["seconds"], after["time"]) == (1.0, 2.5, before["time"])
    assert rescore_stored(plan_with(asked()), storage) == 1
    assert stored(storage) == (before, rows)


def test_pass_marks_that_become_known_are_applied(storage: Storage) -> None:
    assert stored(storage)[0]["exam"]["by_year"]["2021"]["verdict"]["reasons"][-1] == "no pass mark for 2021"
    plan = plan_with(asked(RULES.model_copy(update={"pass_points": {2021: 3}})))
    assert rescore_stored(plan, storage) == 1
    assert stored(storage)[0]["exam"]["by_year"]["2021"]["verdict"]["reasons"][-1] == "3 points in the other sections, 3 asked"
    assert rescore_stored(plan, storage) == 0
    assert rescore_stored(plan_with(asked(None)), storage) == 1
    assert "exam" not in stored(storage)[0]


def test_pictures_are_remembered(storage: Storage) -> None:
    before = stored(storage)[0]["exam"]["by_text_only"]
    assert {name: tally["total"] for name, tally in before.items()} == {"text only": 1, "with pictures": 1}
    rescore_stored(plan_with(asked(metrics=HARNESS_METRICS)), storage)
    assert stored(storage)[0]["exam"]["by_text_only"] == before


def test_a_report_shows_no_scores_of_other_settings(storage: Storage) -> None:
    plan = plan_with(asked())
    rescore_stored(plan_with(asked(metrics=HARNESS_METRICS)), storage)  # as another sweep would
    [score] = write_report(plan, storage).results.by_key[BASE.run_key].scores
    assert score.exact_match == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "0 lines for 2 questions"), ('{"problem_id": "115A1"}\n', "without question, choices, gold, prediction"), ("{\n", "not JSON")],
)
def test_damaged_answers_are_told_by_file(storage: Storage, text: str, told: str) -> None:
    path = storage.run(BASE.run_key).evaluation(asked().folder, 0) / PREDICTIONS
    path.write_text(text)
    with pytest.raises(BadInput, match=f"predictions.jsonl.*damaged: {told}"):
        rescore_stored(plan_with(asked(metrics=HARNESS_METRICS)), storage)
