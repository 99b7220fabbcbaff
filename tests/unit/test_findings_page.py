"""What the page tells of statistics, claims, measuring and the exam's marks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jmedlora.config.benchmark import PromptConfig, ScoringWay
from jmedlora.evaluation.resampling import bootstrap_interval
from jmedlora.plan.layout import METRICS, Storage
from jmedlora.plan.specs import EvaluationSpec, Plan, RunSpec
from jmedlora.report.claims import judge_claims
from jmedlora.report.collect import Results
from jmedlora.report.examples import choose_examples
from jmedlora.report.exams import exam_tables
from jmedlora.report.figures import draw_scores
from jmedlora.report.measuring import measure
from jmedlora.report.page import page_html
from jmedlora.report.significance import Statistics
from jmedlora.report.writer import analyse
from tests.made_up import base_spec, evaluation_spec, plan_of, write_answers
from tests.made_up_answers import EXAM, ONE, QUESTIONS, ZERO, answer, base_of, model, run_of

WEIGHED = evaluation_spec(0, EXAM, scoring="loglikelihood")
WAYS: tuple[ScoringWay, ...] = ("generate", "loglikelihood")
BY_PROMPT = ("accuracy", "Gestalt score")
"""The metrics by which prompts are compared."""


class Tables(HTMLParser):
    """All tables of a page as lists of rows of texts, by their first head cells."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join(" ".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def under(self, *head: str) -> list[list[str]]:
        [table] = [table for table in self.tables if table[0][: len(head)] == list(head)]
        return table[1:]


def page_of(plan: Plan, storage: Storage) -> str:
    return page_from(storage, *analyse(plan, storage))


def page_from(storage: Storage, results: Results, statistics: Statistics) -> str:
    html = page_html(results, storage, statistics, judge_claims(results, statistics.answers), measure(results, statistics))
    return html[: html.index('<script id="plotly">')] if '<script id="plotly">' in html else html


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage]:
    """A run that is clearly better than its base, one that is not, and a reference; 0- and 1-shot, and by log-likelihood."""
    storage = Storage(tmp_path_factory.mktemp("findings"))
    base, reference = base_of(model("calm")), base_of(model("gpt-x"), 0)
    good, same = run_of(base), run_of(base, rank=4)
    evaluations = [ZERO, ONE, WEIGHED]
    for key, step, right in ((base.run_key, 0, 100), (reference.run_key, 0, 300), (good.run_key, 7, 180), (same.run_key, 7, 101)):
        for evaluation in evaluations:
            answer(storage, key, step, evaluation, right)
    return plan_of([base, reference], [good, same], evaluations), storage


@pytest.fixture(scope="module")
def analysed(sweep: tuple[Plan, Storage]) -> tuple[Results, Statistics]:
    return analyse(*sweep)


@pytest.fixture(scope="module")
def html(sweep: tuple[Plan, Storage], analysed: tuple[Results, Statistics]) -> str:
    return page_from(sweep[1], *analysed)


def test_ways_of_scoring_have_sections_of_their_own(html: str) -> None:
    titles = [" ".join(re.sub("<[^>]*>", " ", title).split()) for title in re.findall("<h2.*?</h2>", html)]
    assert titles[:3] == ["All comparisons", "exam prompt alpaca-ja", "exam prompt alpaca-ja, log-likelihood"]
    assert titles[3].startswith("What the study claimed judged on exam, 0-shot, alpaca-ja; exam, 1-shot, alpaca-ja")
    assert titles[4] == "How it was measured"


def test_all_comparisons_stand_in_one_table(html: str) -> None:
    [table] = [table for table in Tables(html).tables if table[0] == ["", "exam"]]
    assert table[1:3] == [["", "alpaca-ja", "alpaca-ja log-likelihood"], ["Run", "0-shot", "1-shot", "0-shot"]]
    rows = {row[0]: row[1:] for row in table[3:]}
    # a score for each metric, of which the page shows one at a time
    assert [cell.split() for cell in rows["gpt-x"]] == [["0.750"] * 3] * 3
    assert rows["calm lora r16 1ep"][0].split()[:4] == ["0.450", "**", "0.450", "**"]
    assert "*" not in rows["calm lora r4 1ep"][0].split()
    assert '<span class="of accuracy" title="+0.200 against the base">0.450<span class="mark up">**</span></span>' in html
    assert '<span class="of accuracy best">0.750' in html
    assert '<body data-shown="gestalt_score">' in html


def test_the_contents_lead_to_what_is_there(html: str) -> None:
    [contents] = re.findall("<nav.*?</nav>", html, re.DOTALL)
    links = dict(re.findall('<a href="#([^"]+)">([^<]*)</a>', contents))
    assert links == {
        "comparison-1": "exam, prompt alpaca-ja",
        "comparison-2": "exam, prompt alpaca-ja, log-likelihood",
        "claims": "What the study claimed",
        "measuring": "How it was measured",
        "predictions": "Predictions side by side",
    }
    assert all(html.count(f' id="{name}"') == 1 for name in links)
    assert set(re.findall('href="(.)', html)) == {"#"}  # nothing leads away


def test_figures_of_the_first_comparison_alone_are_open(html: str) -> None:
    folds = re.findall('<details class="figures"( open)?>.*?</details>', html, re.DOTALL)
    assert folds == [" open", ""]
    outside = re.sub('<details class="figures".*?</details>', "", html, flags=re.DOTALL)
    assert "data-figure=" in html
    assert "data-figure=" not in outside


def test_scores_stand_with_interval_and_marks(html: str) -> None:
    tables = [table for table in Tables(html).tables if len(table) > 1 and table[1][:2] == ["Run", "Step"]]
    assert [len(table[0]) for table in tables] == [2 + 2, 2 + 1]  # 0-shot and 1-shot written, 0-shot by log-likelihood
    rows = {row[0]: row for row in tables[0][2:]}
    bounds = bootstrap_interval((np.arange(QUESTIONS) < 180).astype(float))
    assert rows["calm lora r16 1ep"][2] == f"0.450 +0.200** {bounds.low:.3f} to {bounds.high:.3f}"
    assert rows["calm lora r4 1ep"][2].startswith("0.253 +0.003 0.")  # not certain, so without a mark
    assert rows["gpt-x"][2].startswith("0.750 ")
    assert "+" not in rows["gpt-x"][2]
    assert "** p &lt; 0.01" in html


def test_only_what_runs_start_from_is_greyed_as_a_base(html: str) -> None:
    assert set(re.findall(r'<tr class="base">\s*<td data-value="\d+">([^<]*)', html)) == {"calm base"}


def test_systems_are_compared_with_each_other_the_most_certain_first(html: str) -> None:
    tables = [table for table in Tables(html).tables if table[0][:3] == ["Compared", "Shots", "Metric"]]
    assert len(tables) == 2
    first = tables[0]
    assert len(first) - 1 == 3 * 2 * 3  # pairs of three systems x shots x metrics
    assert first[1][6] == "< 0.001"
    assert {row[0] for row in first[1:]} >= {"calm lora r4 1ep against calm lora r16 1ep"}


def test_verdicts_are_told_in_words_with_their_numbers(html: str) -> None:
    verdicts = re.findall(r'<span class="verdict (\w+)">(.) (\w+)</span>\s*<div>\s*<b>(\w+)\.', html)
    assert ("supported", "✓", "supported", "1a") in verdicts
    assert all(style == word for style, _, word, _ in verdicts)
    assert "accuracy +10.1 points (95 % interval" in html
    assert "6 claims that this sweep cannot speak to" in html
    assert "Needs models named medcalm… and open-calm…" in html
    assert "no more than one in ten may say the opposite" in html
    limits = Tables(html).under("Evaluation", "Questions", "Metric")
    assert [row[:3] for row in limits[:2]] == [[f"exam, 0-shot, {ZERO.prompt.name}", "400", name] for name in ("accuracy", "Gestalt score")]


def test_rankings_of_the_ways_are_shown(html: str) -> None:
    [ways] = [table for table in Tables(html).tables if table[0][:2] == ["Compared", "Benchmark"] and "log-likelihood" in table[1][0]]
    assert ways[1] == [
        *("generation and log-likelihood", "exam, 0-shot", "accuracy", "4", "400"),
        *("1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "0 of 6", "0"),
    ]


def test_final_scores_have_error_bars(analysed: tuple[Results, Statistics]) -> None:
    final = draw_scores(analysed[0], "exam", "alpaca-ja")[-1].figures["accuracy"]
    bar = next(trace for trace in final.data if trace.type == "bar")
    [place] = [index for index, rank in enumerate(bar.x[1]) if rank == "rank 16"]
    bounds = bootstrap_interval((np.arange(QUESTIONS) < 180).astype(float))
    assert bar.y[place] + bar.error_y.array[place] == pytest.approx(bounds.high, abs=1e-4)
    assert bar.y[place] - bar.error_y.arrayminus[place] == pytest.approx(bounds.low, abs=1e-4)


def test_seeds_are_told_as_one_mean(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    runs = [_seeded(run_of(base), seed) for seed in (0, 1)]
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100)
    for run, right in zip(runs, (140, 180), strict=True):
        answer(storage, run.run_key, 7, ZERO, right)
    plan = plan_of([base], runs, [ZERO])
    results, statistics = analyse(plan, storage)
    page = page_from(storage, results, statistics)
    assert "All comparisons" not in page  # there is but one
    assert "<nav" not in page
    rows = Tables(page).under("Runs", "Seeds")
    assert rows[0][1:5] == ["0, 1", "0", "accuracy", "0.400 ± 0.071"]
    final = draw_scores(results, "exam", "alpaca-ja")[-1].figures["accuracy"]
    bar = next(trace for trace in final.data if trace.type == "bar")
    assert (bar.y[0], bar.error_y.array[0], bar.error_y.arrayminus[0]) == (0.4, 0.05, 0.05)  # the range of the two


def _seeded(run: RunSpec, seed: int) -> RunSpec:
    return run.model_copy(update={"run_key": f"seed{seed}", "settings": run.settings.model_copy(update={"seed": seed})})


# ---------------------------------------------------------------- the exam's marks


def marked(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, points: int) -> None:
    """Adds the exam's marks to a stored evaluation."""
    path = storage.run(run_key).evaluation(evaluation.folder, step) / METRICS
    tally = {"correct": points, "total": 400, "accuracy": points / 400, "points": points, "points_total": 500, "share": points / 500}
    part = tally | {"prohibited": 2}
    exam = part | {
        "by_year": {"2021": part | {"required": part, "verdict": {"outcome": "failed", "reasons": ["5 prohibited"]}}},
        "by_section": {},
        "by_category": {"循環器": part, "呼吸器": part | {"accuracy": None}},
        "by_text_only": {},
        "required": part | {"points": points // 2, "points_total": 200, "share": points / 400},
        "verdict": {"outcome": "failed", "reasons": ["<b>150</b> of 200 points"]},
        "human_accuracy": {"questions": 400, "when_right": 0.8, "when_wrong": None},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exam": exam}), encoding="utf-8")


def test_the_exams_marks_are_shown_by_system_year_and_category(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base, epochs=3)
    storage = Storage(tmp_path)
    for key, step, right in ((base.run_key, 0, 100), (run.run_key, 7, 120), (run.run_key, 21, 180)):
        answer(storage, key, step, ZERO, right)
        marked(storage, key, step, ZERO, right)
    html = page_of(plan_of([base], [run], [ZERO]), storage)
    tables = Tables(html)
    assert tables.under("System", "Shots", "Points") == [
        ["calm base", "0", "100 of 500", "20 %", "50 of 200", "2", "80 %", "–", "failed"],
        ["calm lora r16 3ep", "0", "180 of 500", "36 %", "90 of 200", "2", "80 %", "–", "failed"],
    ]
    assert tables.under("System", "Shots", "2021") == [
        ["calm base", "0", "100 of 500 failed"],
        ["calm lora r16 3ep", "0", "180 of 500 failed"],
    ]
    [by_category] = [table for table in tables.tables if table[0][0] == "Category"]
    assert by_category[0][2:] == ["calm lora r16 3ep, 0-shot", "calm base, 0-shot"]
    assert by_category[1:] == [["呼吸器", "400", "–", "–"], ["循環器", "400", "45 %", "25 %"]]
    assert "<b>150</b>" not in html


def test_benchmarks_without_an_exam_have_no_marks(sweep: tuple[Plan, Storage], analysed: tuple[Results, Statistics]) -> None:
    assert exam_tables(analysed[0], sweep[1], [ZERO, ONE]) is None


# ---------------------------------------------------------------- what to be careful of


def test_many_answers_that_resemble_no_choice_are_marked_and_explained(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    for key, step, count in ((base.run_key, 0, 120), (run.run_key, 7, 39)):
        answer(storage, key, step, ZERO, 100)
        path = storage.run(key).evaluation(ZERO.folder, step) / METRICS
        path.write_text(json.dumps(json.loads(path.read_text()) | {"no_resemblance": count}))
    html = page_of(plan_of([base], [run], [ZERO]), storage)
    mark = '<abbr class="doubt" title="120 of 400 answers resemble no choice; they count for the first one">†</abbr>'
    assert html.count(mark) == html.count("<abbr") == 1
    assert "† Many answers resemble no choice; they count for the first one: 120 of 400 (calm base, 0-shot)." in html


def test_sides_without_an_order_take_one_line(tmp_path: Path) -> None:
    """Prompts order the systems by written answers; by log-likelihood one of them scores all alike."""
    other = PromptConfig(name="other-ja", template="Q: {{ instruction }}")
    bases = [base_of(model(f"model-{index}")) for index in range(3)]
    evaluations = [evaluation_spec(0, EXAM, prompt, way) for way in WAYS for prompt in (ZERO.prompt, other)]
    storage = Storage(tmp_path)
    for index, base in enumerate(bases):
        for evaluation in evaluations:
            tied = evaluation.scoring == "loglikelihood" and evaluation.prompt is other
            write_answers(storage, base.run_key, 0, evaluation, np.arange(QUESTIONS) < (200 if tied else 100 + 50 * index))
    html = page_of(plan_of(bases, [], evaluations), storage)
    assert "all tied" not in html
    [table] = [table for table in Tables(html).tables if table[0][:3] == ["Compared", "Benchmark", "Scoring"]]
    assert [row[:4] for row in table[1:]] == [["alpaca-ja and other-ja", "exam, 0-shot", "written answers", each] for each in BY_PROMPT]
    told = " ".join(html[html.index("Order of systems by prompt") :].split())
    assert "2 more without an order to compare: on one side or both, all systems score the same" in told
    assert "<li>exam, 0-shot, log-likelihood: alpaca-ja and other-ja, accuracy</li>" in told


# ---------------------------------------------------------------- little to show


def test_a_sweep_of_references_alone_has_a_page(tmp_path: Path) -> None:
    one, other = base_spec("reference001"), base_of(model("gpt-x"), 0, "api")
    storage = Storage(tmp_path)
    for evaluation in (ZERO, ONE):
        answer(storage, one.run_key, 0, evaluation, 100)
        answer(storage, other.run_key, 0, evaluation, 200)
    plan = plan_of([one, other], [], [ZERO, ONE])
    results, statistics = analyse(plan, storage)
    html = page_from(storage, results, statistics)
    assert "gpt-x" in html
    assert "What the study claimed" not in html
    assert 'class="base"' not in html
    [across] = draw_scores(results, "exam", "alpaca-ja")
    assert across.title == "0-shot against 1-shot"
    assert {trace.name for trace in across.figures["accuracy"].data} == {"as it is"}


def test_predictions_that_are_missing_leave_scores_without_statistics(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    for key, step in ((base.run_key, 0), (run.run_key, 7)):
        answer(storage, key, step, ZERO, 100)
        (storage.run(key).evaluation(ZERO.folder, step) / "predictions.jsonl").unlink()
    html = page_of(plan_of([base], [run], [ZERO]), storage)
    assert "0.250" in html
    assert "What the study claimed" not in html
    assert "Notes on the comparisons" in html


def test_examples_are_written_answers_of_tuned_models(tmp_path: Path) -> None:
    models = [base_of(model(f"a-reference-{index}"), 0) for index in range(4)]
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    for evaluation in (WEIGHED, ZERO):
        for key, step in ((base.run_key, 0), (run.run_key, 7), *((each.run_key, 0) for each in models)):
            write_answers(storage, key, step, evaluation, np.arange(10) < 5)
    results, _ = analyse(plan_of([*models, base], [run], [WEIGHED, ZERO]), storage)
    [examples] = choose_examples(results, storage)
    assert (examples.model, examples.evaluation.scoring) == ("calm", "generate")
