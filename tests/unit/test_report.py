"""A report as a whole: of a sweep that is not complete, of one with several of everything, and written again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.plan.layout import Storage
from jmedlora.report.collect import collect_results
from jmedlora.report.comparison import compare_runs
from jmedlora.report.figures import draw_scores
from jmedlora.report.writer import write_report
from tests.made_up import PROMPT, base_spec, demo_plan, evaluation_spec, plan_of, run_spec, write_evaluation, write_sweep, write_training
from tests.reading import Page, console_text, rows_of, table_of


def test_a_partial_sweep_is_told_as_it_stands(tmp_path: Path) -> None:
    plan, storage = demo_plan(), Storage(tmp_path)
    done, failed, running, half, _waiting = plan.runs
    write_training(storage, done)
    write_training(storage, failed, steps=9, error="loss is not finite at step 9")
    write_training(storage, running, steps=2)
    write_training(storage, half)
    write_evaluation(storage, "base00000032", 0, plan.evaluations[0], 0.2)
    write_evaluation(storage, done.run_key, 7, plan.evaluations[0], 0.4)
    write_evaluation(storage, failed.run_key, 7, plan.evaluations[0], 0.3)
    write_evaluation(storage, half.run_key, 14, plan.evaluations[0], 0.5)
    write_evaluation(storage, half.run_key, 14, plan.evaluations[1], 0.5)
    files = write_report(plan, storage)
    assert sorted(path.name for path in files.folder.iterdir()) == [
        *("claims.json", "comparisons.csv", "costs.csv", "index.html", "measuring.json", "table.csv", "table.md"),
    ]
    page = Page(files.page.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "1 of 5 runs failed" in text
    assert "smollm2-135m lora r4 3ep (lora04030000): loss is not finite at step 9" in text
    assert "Partial: not everything is evaluated yet" in text
    assert "2 of 5 runs finished, 1 running, 1 waiting, 1 failed" in re.sub(r"(\d of \d)(runs)", r"\1 \2", text)
    assert len(rows_of(files.table_csv.read_text())) == 5
    across = draw_scores(collect_results(plan, storage), "sample", "alpaca-ja")[1].figures["accuracy"]
    assert [trace.meta for trace in across.data] == ["smollm2-135m lora r16 3ep"]  # the only one with both scores
    assert len(across.data[0].x) == 1  # its base has only one of them
    progress = {line.result.run_key: line.progress for line in compare_runs(collect_results(plan, storage))[0].lines}
    assert progress == {
        "base00000032": "0",
        "base00000004": "waiting",
        "lora04010000": "7",
        "lora04030000": "7 of 21",
        "lora16010000": "running",
        "lora16030000": "14 of 21",
        "qlora1601000": "waiting",
    }
    markdown = files.table_md.read_text()
    assert "- smollm2-135m lora r4 3ep (`lora04030000`): loss is not finite at step 9" in markdown
    assert "failed: smollm2-135m lora r4 3ep (lora04030000): loss is not finite at step 9\n" in console_text(plan, storage)


def test_a_sweep_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    files = write_report(demo_plan(), Storage(tmp_path))
    html = files.page.read_text(encoding="utf-8")
    assert "Nothing has run yet" in html
    assert "Plotly" not in html
    assert rows_of(files.table_csv.read_text()) == []


def test_several_models_benchmarks_and_prompts(tmp_path: Path) -> None:
    other_model = base_spec("base00000099").model.model_copy(update={"name": "other-1b"})
    base = base_spec("base00000099").model_copy(update={"model": other_model})
    run = run_spec("zzzzzzzzzzzz", base_key="base00000099").model_copy(update={"model": other_model})
    exam, short = BenchmarkConfig(name="exam", bundled="sample/questions.jsonl"), PromptConfig(name="short", template="{{ instruction }}")
    evaluations = [evaluation_spec(0), evaluation_spec(2, exam, short), evaluation_spec(3, exam, short), evaluation_spec(1, exam, short)]
    plan, storage = plan_of([base, base_spec()], [run, run_spec("aaaaaaaaaaaa")], evaluations), Storage(tmp_path)
    write_sweep(storage, plan)
    results = collect_results(plan, storage)
    assert [(item.benchmark, item.prompt, item.shots) for item in compare_runs(results)] == [
        ("sample", PROMPT.name, [0]),
        ("exam", "short", [1, 2, 3]),
    ]
    assert [row["model"] for row in rows_of(table_of(plan, storage))] == ["other-1b"] * 8 + ["smollm2-135m"] * 8
    page = Page(write_report(plan, storage).page.read_text(encoding="utf-8"))
    figures = json.loads(page.code["script#figures"])
    assert len(figures) == 2 + 3 + 1
    titles = [note["text"] for note in figures[2]["accuracy"]["layout"]["annotations"]]
    assert titles == [f"{model}, {shots}-shot" for model in ("other-1b", "smollm2-135m") for shots in (1, 2, 3)]
    assert max(len(line.rstrip()) for line in console_text(plan, storage).splitlines()) <= 100


def test_a_report_is_replaced_by_the_next(tmp_path: Path) -> None:
    plan, storage = demo_plan(), Storage(tmp_path)
    before = write_report(plan, storage).table_csv.read_text()
    write_sweep(storage, plan)
    files = write_report(plan, storage)
    after = files.table_csv.read_text()
    assert len(after) > len(before)
    write_report(plan, storage)
    assert files.table_csv.read_text() == after
    assert len(list(files.folder.iterdir())) == 7
