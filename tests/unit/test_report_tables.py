"""The report's tables and the comparison in the terminal."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from jmedlora.config.benchmark import MetricSettings, PromptConfig
from jmedlora.evaluation.statistics import bootstrap_interval
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.specs import Plan
from jmedlora.report.collect import METRICS, Score, collect_results
from jmedlora.report.comparison import change_text, compare_runs
from jmedlora.report.doubts import doubts_of
from jmedlora.report.table import costs_csv, table_md
from jmedlora.report.writer import analyse
from tests.made_up import PROMPT, base_spec, demo, evaluation_spec, plan_of, run_spec, write_answers, write_evaluation, write_training
from tests.reading import console_text, rows_of, table_of

CONTRACT = "run_key,model,method,lora_rank,lora_alpha,epochs,step,seed,benchmark,shots,prompt,n,accuracy,exact_match,gestalt_score,scoring"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage]:
    return demo(tmp_path_factory.mktemp("finished"))


def test_names_tell_what_sets_runs_apart() -> None:
    by_steps = run_spec("aaaaaaaaaaaa", rank=8, learning_rate=5e-5)
    runs = [
        by_steps.model_copy(
            update={"settings": by_steps.settings.model_copy(update={"epochs": None, "max_steps": 900}), "total_steps": 900}
        ),
        run_spec("bbbbbbbbbbbb", rank=8, learning_rate=2e-4),
        run_spec("cccccccccccc", rank=8, learning_rate=2e-4, gradient_checkpointing=True),
    ]
    assert names_of(plan_of([base_spec()], runs)) == {
        "aaaaaaaaaaaa": "smollm2-135m lora r8 900 steps lr5e-05",
        "bbbbbbbbbbbb": "smollm2-135m lora r8 1ep lr0.0002 bbbbbb",  # nothing that a name tells sets these two apart
        "cccccccccccc": "smollm2-135m lora r8 1ep lr0.0002 cccccc",
        "base00000032": "smollm2-135m base",
    }
    several = [run_spec("aaaaaaaaaaaa", targets=[]), run_spec("bbbbbbbbbbbb", targets=["q_proj"])]
    assert names_of(plan_of([base_spec()], several))["aaaaaaaaaaaa"] == "smollm2-135m lora r16 1ep"


# ---------------------------------------------------------------- tables


def test_table_has_the_contracts_columns_and_a_row_per_evaluated_step(finished: tuple[Plan, Storage]) -> None:
    text = table_of(*finished)
    assert text.splitlines()[0].startswith(CONTRACT + ",")
    rows = rows_of(text)
    # 2 shots x (2 bases at step 0, 3 runs of one checkpoint, 2 runs of three)
    assert len(rows) == 2 * (2 + 3 + 2 * 3)
    [row] = [row for row in rows if (row["run_key"], row["step"], row["shots"]) == ("lora16030000", "14", "1")]
    assert [
        row[key] for key in ("model", "method", "lora_rank", "lora_alpha", "epochs", "seed", "benchmark", "prompt", "n", "precision")
    ] == [*("smollm2-135m", "lora", "16", "32", "3", "0", "sample", "alpaca-ja", "40", "fp32")]
    plan, storage = finished
    stored = json.loads((storage.run("lora16030000").evaluation(plan.evaluations[1].folder, 14) / "metrics.json").read_text())
    for score in ("accuracy", "exact_match", "gestalt_score"):
        assert float(row[score]) == stored[score]
    assert float(row["accuracy_low"]) < stored["accuracy"] < float(row["accuracy_high"])


def test_table_is_in_a_stable_order_and_independent_of_the_plans(finished: tuple[Plan, Storage]) -> None:
    plan, storage = finished
    rows = rows_of(table_of(plan, storage))
    order = list(dict.fromkeys((row["method"], row["precision"], int(row["lora_rank"]), row["epochs"]) for row in rows))
    assert order == [
        *(("base", "fp32", 0, "0"), ("base", "nf4", 0, "0")),
        *(("lora", "fp32", 4, "1"), ("lora", "fp32", 4, "3"), ("lora", "fp32", 16, "1"), ("lora", "fp32", 16, "3")),
        ("qlora", "nf4", 16, "1"),
    ]
    assert [(row["step"], row["shots"]) for row in rows if row["run_key"] == "lora04030000"] == [
        *(("7", "0"), ("7", "1"), ("14", "0"), ("14", "1"), ("21", "0"), ("21", "1"))
    ]
    turned = plan.model_copy(update={name: getattr(plan, name)[::-1] for name in ("bases", "runs", "evaluations", "trials")})
    assert table_of(turned, storage) == table_of(plan, storage)


def test_table_does_not_depend_on_clock_or_machine(tmp_path: Path) -> None:
    tables = []
    for started in (1_700_000_000.0, 1_800_000_000.0):
        storage, plan = Storage(tmp_path / str(started)), plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")])
        write_training(storage, plan.runs[0], started=started)
        write_evaluation(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], 0.5, time=started)
        tables.append(table_of(plan, storage))
    assert tables[0] == tables[1]
    assert len(rows_of(tables[0])) == 1


def test_costs_count_seconds_tokens_and_gpu_hours(tmp_path: Path) -> None:
    plan, storage = demo(tmp_path)
    wide = [plan.trials[0].model_copy(update={"gpus_per_worker": 2}), *plan.trials[1:]]
    rows = {row["run_key"]: row for row in rows_of(costs_csv(collect_results(plan.model_copy(update={"trials": wide}), storage)))}
    records = [json.loads(line) for line in storage.run("lora04010000").train_jsonl.read_text().splitlines()]
    seconds, tokens = sum(record["seconds"] for record in records), sum(record["tokens"] for record in records)
    row = rows["lora04010000"]
    assert row["name"] == "smollm2-135m lora r4 1ep"
    assert float(row["training_seconds"]) == pytest.approx(seconds, abs=0.05)
    assert int(row["tokens"]) == tokens
    assert float(row["tokens_per_s"]) == pytest.approx(tokens / seconds, abs=0.05)
    assert float(row["gpu_hours"]) == pytest.approx(2 * seconds / 3600, abs=5e-5)
    assert float(row["evaluation_seconds"]) == 2 * 31.5
    assert float(rows["base00000032"]["gpu_hours"]) == 0


def test_comparison_is_against_the_base_of_the_same_precision(finished: tuple[Plan, Storage]) -> None:
    results = collect_results(*finished)
    [comparison] = compare_runs(results)
    lines = {line.result.run_key: line for line in comparison.lines}
    qlora, base = lines["qlora1601000"], lines["base00000004"]
    cell, before = qlora.cells[0, "accuracy"], base.cells[0, "accuracy"]
    assert cell is not None
    assert before is not None
    assert cell.change == cell.value - before.value
    assert before.change is None
    for column in lines["qlora1601000"].cells:
        cells = [line.cells[column] for line in comparison.lines]
        best = max(cell.value for cell in cells if cell)
        assert {cell.value for cell in cells if cell and cell.is_best} == {best}


def test_changes_are_told_with_their_sign() -> None:
    assert [change_text(value) for value in (0.1, -0.0254, 0.0, -1e-9)] == ["+0.100", "−0.025", "±0.000", "±0.000"]


def test_table_md_shows_both_shots_side_by_side(finished: tuple[Plan, Storage]) -> None:
    text = table_md(*analyse(*finished))
    [head] = [line for line in text.splitlines() if line.startswith("| Run")]
    assert head.split(" | ")[3:] == [
        *("0-shot accuracy", "0-shot exact match", "0-shot Gestalt score"),
        *("1-shot accuracy", "1-shot exact match", "1-shot Gestalt score |"),
    ]
    body = [line for line in text.splitlines() if line.startswith("| smollm2")]
    assert len(body) == 7
    assert {line.count(" | ") for line in body} == {8}
    assert "(" not in body[0]  # a base has nothing to be compared with
    assert body[2].count("(") == 6


@pytest.mark.parametrize(("width", "tables"), [(60, 2), (80, 2), (100, 2), (120, 2), (140, 1)])
def test_console_sets_shots_side_by_side_where_there_is_room(finished: tuple[Plan, Storage], width: int, tables: int) -> None:
    lines = console_text(*finished, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert sum("r16 3ep" in line for line in lines) == tables  # no name is broken over two lines
    assert sum(line.strip() == "smollm2-135m" for line in lines) == tables
    assert "…" not in "".join(lines)  # nothing is cut
    bounds = [re.findall(r"[.1][0-9]{1,2}-[.1][.0-9]{2}", line) for line in lines]
    assert {len(each) for each in bounds if each} == {6 // tables}
    assert any("r16 3ep" in line and each for line, each in zip(lines, bounds, strict=True)) == (width > 60)


def test_console_tells_intervals_and_marks_what_is_more_than_luck(tmp_path: Path) -> None:
    plan, storage = (
        plan_of([base_spec()], [run_spec("aaaaaaaaaaaa"), run_spec("bbbbbbbbbbbb", rank=4)], [evaluation_spec(0)]),
        Storage(tmp_path),
    )
    write_answers(storage, "base00000032", 0, plan.evaluations[0], [index % 5 == 0 for index in range(100)])
    write_answers(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], [index % 2 == 0 for index in range(100)])
    write_answers(storage, "bbbbbbbbbbbb", 7, plan.evaluations[0], [index % 5 < 2 for index in range(100)])
    text = console_text(plan, storage)
    [base] = [line for line in text.splitlines() if "  base" in line]
    assert base.split() == ["base", "0", *["0.200", ".13-.28"] * 3]
    [better] = [line for line in text.splitlines() if "lora r16" in line]
    assert better.split() == ["lora", "r16", "1ep", "7", *["0.500", ".40-.60**"] * 3, "+0.300"]
    assert "95 % interval over the questions (BCa bootstrap; Wilson's where every answer scores the same)" in " ".join(text.split())
    assert "* p < 0.05" in text
    marked = table_md(*analyse(plan, storage))
    assert "**0.500** [0.400, 0.600] (+0.300\\*\\*)" in marked


def test_console_shows_both_bounds_of_a_skewed_interval(tmp_path: Path) -> None:
    """Scores at either end have all their doubt on one side."""
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0)]), Storage(tmp_path)
    write_answers(storage, "base00000032", 0, plan.evaluations[0], [False] * 40)
    write_answers(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], [True] * 4)
    lines = console_text(plan, storage).splitlines()
    assert [line.split()[2:4] for line in lines if "  base" in line] == [["0.000", ".00-.09"]]
    assert [line.split()[4:6] for line in lines if "  lora" in line] == [["1.000", ".51-1.0"]]


def test_prompts_that_make_no_difference_are_not_told(tmp_path: Path) -> None:
    other = PromptConfig(name="other-ja", template="Q: {{ instruction }}")
    evaluations = [evaluation_spec(shots, prompt=prompt) for shots in (0, 1) for prompt in (PROMPT, other)]
    plan, storage = plan_of([base_spec()], [], evaluations), Storage(tmp_path)
    for evaluation in evaluations:
        helped = evaluation.shots and evaluation.prompt.name == "other-ja"
        write_answers(storage, "base00000032", 0, evaluation, np.arange(40) < (20 if helped else 10))
    told = [line for line in console_text(plan, storage).splitlines() if line.startswith("prompts,")]
    assert len(told) == 1
    assert told[0].startswith("prompts, sample 1-shot: accuracy of one run differs by up to 0.250")


def test_many_answers_that_resemble_no_choice_are_warned_of(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0)]), Storage(tmp_path)
    [evaluation] = plan.evaluations
    for key, step, counts in (
        ("base00000032", 0, {"no_resemblance": 12, "empty_answers": 3, "cut_answers": 40}),
        ("aaaaaaaaaaaa", 7, {"no_resemblance": 3}),
    ):
        write_answers(storage, key, step, evaluation, np.arange(40) < 10)
        path = storage.run(key).evaluation(evaluation.folder, step) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | counts))
    text = console_text(plan, storage)
    [base] = [line for line in text.splitlines() if "  base" in line]
    [run] = [line for line in text.splitlines() if "  lora" in line]
    assert base.split()[2:4] == ["0.250", ".12-.40†§"]
    assert run.split()[5] == ".12-.40"  # three of forty are few
    told = " ".join(text.split())
    assert "† Many answers resemble no choice; they count for the first one: 12 of 40 (smollm2-135m base, 0-shot)." in told
    assert "§ Many answers were cut off after 24 tokens: 40 of 40 (smollm2-135m base, 0-shot)." in told
    assert "‡" not in told
    rows = rows_of(table_of(plan, storage))
    counts_of = [[row[key] for key in ("no_resemblance", "empty_answers", "cut_answers")] for row in rows]
    assert counts_of == [["12", "3", "40"], ["3", "", ""]]
    assert "12 of 40 (smollm2-135m base, 0-shot)" in table_md(*analyse(plan, storage))


@pytest.mark.parametrize(
    ("settings", "answer", "told"),
    [
        ({}, "text", "resemble no choice; they count for the first one"),
        ({"ties": "last"}, "text", "resemble no choice; they count for the last one"),
        ({"ties": "wrong"}, "text", "resemble no choice; they count as wrong"),
        ({}, "letters", "name no choice; they count as wrong"),
    ],
)
def test_a_warning_tells_what_such_answers_count_for(settings: dict[str, str], answer: Literal["text", "letters"], told: str) -> None:
    prompt = PROMPT.model_copy(update={"answer": answer})
    evaluation = evaluation_spec(0, prompt=prompt).model_copy(update={"metrics": MetricSettings.model_validate(settings)})
    score = Score(0, evaluation, 40, 0.2, 0.2, 0.2, 1.0, 1.0, doubtful={"no_resemblance": 4})
    assert [doubt.text for doubt in doubts_of(score)] == [f"4 of 40 answers {told}"]
    assert doubts_of(replace(score, doubtful={"no_resemblance": 3})) == []


def test_bounds_are_the_stored_ones_and_else_computed(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [], [evaluation_spec(0), evaluation_spec(1)]), Storage(tmp_path)
    right = [index % 4 == 0 for index in range(80)]
    for evaluation in plan.evaluations:
        write_answers(storage, "base00000032", 0, evaluation, right)
    path = storage.run("base00000032").evaluation(plan.evaluations[1].folder, 0) / "metrics.json"
    stored = {f"{metric}_{bound}": value for metric in METRICS for bound, value in (("low", 0.123), ("high", 0.456))}
    path.write_text(json.dumps(json.loads(path.read_text()) | stored))
    computed, given = rows_of(table_of(plan, storage))
    interval = bootstrap_interval(np.array(right))
    for metric in METRICS:
        assert (float(computed[f"{metric}_low"]), float(computed[f"{metric}_high"])) == (round(interval.low, 6), round(interval.high, 6))
        assert (given[f"{metric}_low"], given[f"{metric}_high"]) == ("0.123", "0.456")


def test_bounds_need_predictions(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [], [evaluation_spec(0)]), Storage(tmp_path)
    write_answers(storage, "base00000032", 0, plan.evaluations[0], [True, False])
    (storage.run("base00000032").evaluation(plan.evaluations[0].folder, 0) / "predictions.jsonl").unlink()
    [row] = rows_of(table_of(plan, storage))
    assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == ("0.5", "", "")


def test_p_values_stand_at_final_steps_alone(finished: tuple[Plan, Storage]) -> None:
    rows = rows_of(table_of(*finished))
    told = {(row["run_key"], row["step"]) for row in rows if row["accuracy_p"]}
    assert told == {("lora04010000", "7"), ("lora04030000", "21"), ("lora16010000", "7"), ("lora16030000", "21"), ("qlora1601000", "7")}
    for row in rows:
        for metric in METRICS:
            assert bool(row[f"{metric}_p"]) == bool(row[f"{metric}_p_holm"]) == ((row["run_key"], row["step"]) in told)
            assert not row[f"{metric}_p"] or float(row[f"{metric}_p"]) <= float(row[f"{metric}_p_holm"])
