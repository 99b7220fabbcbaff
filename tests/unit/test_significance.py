"""What a report compares with what, on made-up answers whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.faults import BadInput
from jmedlora.evaluation.statistics import compare_scores, compare_shares, holm
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec, Plan
from jmedlora.report.answers import AnswerBook, pooled
from jmedlora.report.comparison import compare_runs
from jmedlora.report.significance import COMPARED_SYSTEMS, Row, Statistics
from jmedlora.report.statistic_tables import COMPARISON_COLUMNS, comparisons_csv, prompts_csv, replicates_csv
from jmedlora.report.table import table_csv
from jmedlora.report.writer import analyse, write_report
from tests.made_up import base_spec, demo_plan, evaluation_spec, plan_of, run_spec, write_answers, write_sweep
from tests.reading import console_text, rows_of

QUESTIONS = 120


def answers_of(seed: int, share: float, questions: int = QUESTIONS) -> np.ndarray:
    return np.random.default_rng(seed).random(questions) < share


def similarities_of(right: np.ndarray) -> np.ndarray:
    return np.where(right, 1.0, np.arange(len(right)) % 7 / 10)


def write_system(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, right: np.ndarray) -> None:
    write_answers(storage, run_key, step, evaluation, right, similarities_of(right))


def three_runs(root: Path) -> tuple[Plan, Storage, dict[str, np.ndarray]]:
    """A base and three runs, evaluated twice; 'right' by run_key is that of 0-shot."""
    runs = [run_spec(f"run{rank:09d}", rank=rank) for rank in (2, 4, 8)]
    plan, storage = plan_of([base_spec()], runs), Storage(root)
    keys = [(plan.bases[0].run_key, 0), *((run.run_key, 7) for run in runs)]
    right = {key: answers_of(index, 0.3 + 0.1 * index) for index, (key, _) in enumerate(keys)}
    for index, (key, step) in enumerate(keys):
        write_system(storage, key, step, plan.evaluations[0], right[key])
        write_system(storage, key, step, plan.evaluations[1], answers_of(10 + index, 0.4))
    return plan, storage, right


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage, dict[str, np.ndarray]]:
    return three_runs(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def of_three(three: tuple[Plan, Storage, dict[str, np.ndarray]]) -> Statistics:
    return analyse(*three[:2])[1]


def row_between(rows: list[Row], run_key: str, other_key: str, metric: str, shots: int = 0) -> Row:
    [row] = [row for row in rows if (row.run_key, row.other_key, row.metric, row.shots) == (run_key, other_key, metric, shots)]
    return row


# ---------------------------------------------------------------- what is compared


def test_every_run_is_compared_with_its_base_and_with_each_other(
    three: tuple[Plan, Storage, dict[str, np.ndarray]], of_three: Statistics
) -> None:
    right, statistics = three[2], of_three
    assert len(statistics.against_base) == 3 * 2 * 3
    assert len(statistics.between_runs) == 3 * 2 * 3
    row = row_between(statistics.against_base, "run000000008", "base00000032", "accuracy")
    found = compare_shares(right["base00000032"], right["run000000008"])
    assert (row.kind, row.n, row.difference, row.low, row.high, row.p) == ("base", 120, *_numbers(found))
    assert (row.effect, row.questions_needed, row.reversal_of_50, row.method) == (
        found.effect,
        found.questions_needed,
        found.reversal,
        found.method,
    )
    assert row.difference > 0  # the run is the better one
    row = row_between(statistics.between_runs, "run000000002", "run000000004", "gestalt_score")
    found = compare_scores(similarities_of(right["run000000004"]), similarities_of(right["run000000002"]))
    assert (row.kind, row.difference, row.low, row.high) == ("run", pytest.approx(found.difference), found.low, found.high)
    assert row.p == pytest.approx(found.p)
    assert statistics.notes == []


def _numbers(found: object) -> tuple[float, float, float, float]:
    return tuple(getattr(found, name) for name in ("difference", "low", "high", "p"))  # type: ignore[return-value]


def test_holms_families(of_three: Statistics) -> None:
    for metric in ("accuracy", "exact_match", "gestalt_score"):
        over_the_sweep = [row for row in of_three.against_base if row.metric == metric]
        assert len(over_the_sweep) == 6
        assert_corrected(over_the_sweep)
        for shots in (0, 1):
            assert_corrected([row for row in of_three.between_runs if (row.metric, row.shots) == (metric, shots)])


def assert_corrected(rows: list[Row]) -> None:
    assert [row.p_holm for row in rows] == holm([row.p for row in rows])


def test_the_last_step_is_compared(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa", epochs=3)], [evaluation_spec(0)]), Storage(tmp_path)
    write_system(storage, "base00000032", 0, plan.evaluations[0], answers_of(0, 0.3))
    for step, share in ((7, 0.9), (14, 0.4)):
        write_system(storage, "aaaaaaaaaaaa", step, plan.evaluations[0], answers_of(step, share))
    results, statistics = analyse(plan, storage)
    assert {(row.step, row.other_step) for row in statistics.against_base} == {(14, 0)}
    first, last = results.by_key["aaaaaaaaaaaa"].scores
    assert statistics.row_of("aaaaaaaaaaaa", first, "accuracy") is None
    assert statistics.row_of("aaaaaaaaaaaa", last, "accuracy") is statistics.against_base[0]
    assert first.intervals["accuracy"].low > last.intervals["accuracy"].high


def test_models_evaluated_as_they_are_stand_beside_the_runs(tmp_path: Path) -> None:
    reference = base_spec("reference0000", "api")
    reference = reference.model_copy(update={"model": reference.model.model_copy(update={"name": "served"})})
    plan, storage = plan_of([base_spec(), reference], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0)]), Storage(tmp_path)
    for index, (key, step) in enumerate((("base00000032", 0), ("reference0000", 0), ("aaaaaaaaaaaa", 7))):
        write_system(storage, key, step, plan.evaluations[0], answers_of(index, 0.3 + 0.2 * index))
    results, statistics = analyse(plan, storage)
    assert [result.run_key for result in results.references] == ["reference0000"]
    assert {(row.run_key, row.other_key) for row in statistics.against_base} == {("aaaaaaaaaaaa", "base00000032")}
    assert {frozenset((row.run_key, row.other_key)) for row in statistics.between_runs} == {frozenset(("aaaaaaaaaaaa", "reference0000"))}


def test_a_sweep_of_models_alone_compares_them(tmp_path: Path) -> None:
    bases = [base_spec(f"model{index:08d}") for index in range(3)]
    plan, storage = plan_of(bases, [], [evaluation_spec(0)]), Storage(tmp_path)
    for index, base in enumerate(bases):
        write_system(storage, base.run_key, 0, plan.evaluations[0], answers_of(index, 0.4))
    _, statistics = analyse(plan, storage)
    assert statistics.against_base == []
    assert len(statistics.between_runs) == 3 * 3


def test_of_many_systems_the_best_is_compared_with_each(tmp_path: Path) -> None:
    runs = [run_spec(f"{index:012d}", rank=index + 1) for index in range(COMPARED_SYSTEMS + 1)]
    plan, storage = plan_of([base_spec()], runs, [evaluation_spec(0)]), Storage(tmp_path)
    for index, run in enumerate(runs):
        write_system(storage, run.run_key, 7, plan.evaluations[0], np.arange(60) < 10 + (index * 7) % 41)
    _, statistics = analyse(plan, storage)
    pairs = [(row.run_key, row.other_key) for row in statistics.between_runs if row.metric == "accuracy"]
    [best] = {run for run, _ in pairs}
    assert int(best) * 7 % 41 == 40
    assert len({other for _, other in pairs}) == len(pairs) == COMPARED_SYSTEMS
    assert all(row.difference > 0 for row in statistics.between_runs)
    [note] = statistics.notes
    assert "of 41 systems the best of each metric is compared with each other one" in note


# ---------------------------------------------------------------- which questions


def test_only_shared_questions_are_compared(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0)]), Storage(tmp_path)
    first, second = answers_of(0, 0.3), answers_of(1, 0.6)
    ids = [f"Q{index}" for index in range(QUESTIONS)]
    # the run answered all but the first 20, in another order, and three others
    order = np.random.default_rng(2).permutation(np.arange(20, QUESTIONS))
    write_answers(storage, "base00000032", 0, plan.evaluations[0], first, problem_ids=ids)
    own = [*(ids[index] for index in order), "X1", "X2", "X3"]
    write_answers(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], [*second[order], True, True, True], problem_ids=own)
    _, statistics = analyse(plan, storage)
    row = row_between(statistics.against_base, "aaaaaaaaaaaa", "base00000032", "accuracy")
    found = compare_shares(first[20:], second[20:])
    assert row.n == 100
    assert (row.difference, row.p, row.effect) == (pytest.approx(found.difference), pytest.approx(found.p), found.effect)


def test_without_a_shared_question_nothing_is_compared(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0)]), Storage(tmp_path)
    write_answers(storage, "base00000032", 0, plan.evaluations[0], [True, False], problem_ids=["A", "B"])
    write_answers(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], [True, False], problem_ids=["C", "D"])
    assert analyse(plan, storage)[1].against_base == []


def test_missing_predictions_are_told(tmp_path: Path) -> None:
    plan, storage, _ = three_runs(tmp_path)
    (storage.run("run000000004").evaluation(plan.evaluations[0].folder, 7) / "predictions.jsonl").unlink()
    _, statistics = analyse(plan, storage)
    assert {row.run_key for row in statistics.against_base if row.shots == 0} == {"run000000002", "run000000008"}
    assert statistics.notes == [
        f"{plan.evaluations[0].folder}: not compared, since no predictions are stored: smollm2-135m lora r4 1ep",
    ]
    assert f"note: {statistics.notes[0][:40]}" in console_text(plan, storage)


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    plan, storage, _ = three_runs(tmp_path)
    path = storage.run("run000000004").evaluation(plan.evaluations[0].folder, 7) / "predictions.jsonl"
    path.write_text("".join(json.dumps({"problem_id": f"Q{index}", "correct": True}) + "\n" for index in range(3)))
    with pytest.raises(BadInput, match=r"predictions\.jsonl: damaged: a line without exact_match"):
        analyse(plan, storage)


def test_pooled_answers_are_those_that_all_gave(tmp_path: Path) -> None:
    evaluation, storage = evaluation_spec(0), Storage(tmp_path)
    write_answers(storage, "one", 1, evaluation, [True, False, True, True], problem_ids=["A", "B", "C", "D"])
    write_answers(storage, "two", 1, evaluation, [True, True, False], problem_ids=["C", "B", "X"])
    write_answers(storage, "three", 1, evaluation, [False, True, False, True], problem_ids=["D", "C", "A", "B"])
    book = AnswerBook(storage)
    members = [book.of(key, 1, evaluation) for key in ("one", "two", "three")]
    together = pooled([own for own in members if own is not None])
    assert together.problem_ids == ("B", "C")
    assert together.scores("accuracy").tolist() == pytest.approx([2 / 3, 1.0])
    assert not together.is_share("accuracy")


def test_ways_of_scoring_are_kept_apart(tmp_path: Path) -> None:
    evaluations = [evaluation_spec(0), evaluation_spec(0, scoring="loglikelihood")]
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], evaluations), Storage(tmp_path)
    for index, evaluation in enumerate(evaluations):
        write_system(storage, "base00000032", 0, evaluation, answers_of(index, 0.3))
        write_system(storage, "aaaaaaaaaaaa", 7, evaluation, answers_of(5 + index, 0.4 + 0.4 * index))
    results, statistics = analyse(plan, storage)
    comparisons = compare_runs(results, statistics)
    assert [comparison.title for comparison in comparisons] == ["sample, prompt alpaca-ja", "sample, prompt alpaca-ja, log-likelihood"]
    written, likelihood = (comparison.lines[1].cells[0, "accuracy"] for comparison in comparisons)
    assert written is not None
    assert likelihood is not None
    assert written.value < 0.6 < likelihood.value
    assert likelihood.mark == "**"
    rows = rows_of(table_csv(results, statistics))
    assert [(row["run_key"], row["scoring"]) for row in rows if row["step"] == "7"] == [
        ("aaaaaaaaaaaa", "generate"),
        ("aaaaaaaaaaaa", "loglikelihood"),
    ]
    text = console_text(plan, storage)
    assert "sample, prompt alpaca-ja, log-likelihood" in text


# ---------------------------------------------------------------- files


def test_comparisons_do_not_depend_on_the_order_of_the_plan(tmp_path: Path) -> None:
    plan, storage = demo_plan(), Storage(tmp_path)
    write_sweep(storage, plan)
    turned = plan.model_copy(update={name: getattr(plan, name)[::-1] for name in ("bases", "runs", "evaluations", "trials")})
    text = comparisons_csv(analyse(plan, storage)[1])
    assert comparisons_csv(analyse(turned, storage)[1]) == text
    rows = rows_of(text)
    assert tuple(rows[0]) == COMPARISON_COLUMNS
    assert [row["kind"] for row in rows] == ["base"] * (5 * 2 * 3) + ["run"] * (10 * 2 * 3)
    assert {row["reversal_of_50"] for row in rows} == {""}  # there are only 40 questions


# ---------------------------------------------------------------- seeds


def seeds(root: Path) -> tuple[Plan, Storage, list[np.ndarray]]:
    """Three runs with the same settings but for the seed, one of another rank."""
    runs = [run_spec(f"seed{seed:08d}", seed=seed) for seed in (2, 0, 1)] + [run_spec("other0000000", rank=2)]
    plan, storage = plan_of([base_spec()], runs, [evaluation_spec(0)]), Storage(root)
    right = [answers_of(20, 0.3), *(answers_of(21 + seed, 0.45) for seed in range(3))]
    write_system(storage, "base00000032", 0, plan.evaluations[0], right[0])
    for seed in range(3):
        write_system(storage, f"seed{seed:08d}", 7, plan.evaluations[0], right[1 + seed])
    write_system(storage, "other0000000", 7, plan.evaluations[0], answers_of(30, 0.4))
    return plan, storage, right


def test_seeds_are_replicates(tmp_path: Path) -> None:
    plan, storage, (base, *runs) = seeds(tmp_path)
    _, statistics = analyse(plan, storage)
    assert [row.metric for row in statistics.replicates] == ["accuracy", "exact_match", "gestalt_score"]
    row = statistics.replicates[0]
    assert row.run_keys == ("seed00000000", "seed00000001", "seed00000002")
    assert (row.seeds, row.step, row.n) == ((0, 1, 2), 7, QUESTIONS)
    shares = [run.mean() for run in runs]
    assert row.mean == pytest.approx(np.mean(shares))
    assert row.sd == pytest.approx(np.std(shares, ddof=1))
    assert row.against_base is not None
    found = compare_shares(base, np.column_stack(runs))
    assert row.against_base.method == found.method
    assert row.against_base.difference == pytest.approx(found.difference)
    assert (row.against_base.low, row.against_base.high, row.against_base.p) == (found.low, found.high, pytest.approx(found.p))
    assert row.p_holm == row.against_base.p  # the only group of its metric
    # three answers to a question say more than one: the group's interval is narrower than a run's
    one = next(row for row in statistics.against_base if row.run_key == "seed00000000")
    assert row.against_base.high - row.against_base.low < one.high - one.low
    [line, *_] = rows_of(replicates_csv(statistics))
    assert (line["run_keys"], line["seeds"]) == ("seed00000000 seed00000001 seed00000002", "0 1 2")
    assert float(line["difference"]) == pytest.approx(found.difference, abs=1e-6)


def test_seeds_that_are_not_there_yet_wait(tmp_path: Path) -> None:
    plan, storage, _ = seeds(tmp_path)
    path = storage.run("seed00000002").evaluation(plan.evaluations[0].folder, 7)
    (path / "metrics.json").unlink()
    assert {row.seeds for row in analyse(plan, storage)[1].replicates} == {(0, 1)}
    (storage.run("seed00000001").evaluation(plan.evaluations[0].folder, 7) / "metrics.json").unlink()
    assert analyse(plan, storage)[1].replicates == []


def test_without_their_base_replicates_have_no_comparison(tmp_path: Path) -> None:
    plan, storage, _ = seeds(tmp_path)
    (storage.run("base00000032").evaluation(plan.evaluations[0].folder, 0) / "metrics.json").unlink()
    statistics = analyse(plan, storage)[1]
    assert {(row.against_base, row.p_holm) for row in statistics.replicates} == {(None, None)}
    assert {line["p"] for line in rows_of(replicates_csv(statistics))} == {""}


# ---------------------------------------------------------------- prompts


def prompts(root: Path) -> tuple[Plan, Storage]:
    evaluations = [evaluation_spec(0), evaluation_spec(0, prompt=PromptConfig(name="terse", template="{{ instruction }}"))]
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], evaluations), Storage(root)
    for run_key, step, counts in (("base00000032", 0, (10, 12)), ("aaaaaaaaaaaa", 7, (30, 18))):
        for evaluation, count in zip(evaluations, counts, strict=True):
            write_answers(storage, run_key, step, evaluation, np.arange(60) < count)
    return plan, storage


def test_the_spread_over_prompts(tmp_path: Path) -> None:
    plan, storage = prompts(tmp_path)
    statistics = analyse(plan, storage)[1]
    base, run = rows_of(prompts_csv(statistics))
    assert (base["run_key"], run["run_key"], run["prompts"]) == ("base00000032", "aaaaaaaaaaaa", "alpaca-ja terse")
    assert [float(run[f"accuracy_{name}"]) for name in ("min", "max", "mean", "range")] == pytest.approx([0.3, 0.5, 0.4, 0.2])
    assert float(base["gestalt_score_range"]) == pytest.approx(2 / 60, abs=1e-6)
    text = " ".join(console_text(plan, storage).split())
    assert "prompts, sample 0-shot: accuracy of one run differs by up to 0.200, smollm2-135m lora r16 1ep: 0.300 with terse" in text


def test_files_are_there_where_there_is_something_to_tell(tmp_path: Path) -> None:
    plan, storage = prompts(tmp_path / "prompts")
    files = write_report(plan, storage)
    assert files.replicates_csv is None
    assert files.prompts_csv is not None
    assert files.prompts_csv.is_file()
    # the next report is of one prompt alone: what the last one said of two is gone
    write_report(plan.model_copy(update={"evaluations": plan.evaluations[:1]}), storage)
    assert not files.prompts_csv.exists()
    with_seeds, of_seeds, _ = seeds(tmp_path / "seeds")
    replicates = write_report(with_seeds, of_seeds).replicates_csv
    assert replicates is not None
    assert len(rows_of(replicates.read_text(encoding="utf-8"))) == 3


def test_nothing_stored_is_nothing_compared(tmp_path: Path) -> None:
    statistics: Statistics = analyse(demo_plan(), Storage(tmp_path))[1]
    assert (statistics.against_base, statistics.between_runs, statistics.replicates, statistics.prompts, statistics.notes) == (
        *([], [], []),
        *([], []),
    )
    assert rows_of(comparisons_csv(statistics)) == []
