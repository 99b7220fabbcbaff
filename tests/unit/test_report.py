"""The report on made-up storage: its tables, its page, and what it says of a sweep that is not complete."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.specs import Plan
from jmedlora.report.collect import collect_results
from jmedlora.report.comparison import change_text, compare_runs
from jmedlora.report.console import console_comparison, print_failures
from jmedlora.report.figures import DRAWN_RUNS, draw_losses, draw_scores
from jmedlora.report.table import costs_csv, table_csv, table_md, wilson_interval
from jmedlora.report.writer import write_report
from tests.made_up import (
    PROMPT,
    base_spec,
    demo,
    demo_plan,
    evaluation_spec,
    plan_of,
    run_spec,
    write_evaluation,
    write_sweep,
    write_training,
)

CONTRACT = (
    "run_key,model,method,lora_rank,lora_alpha,epochs,step,seed,benchmark,shots,prompt,n,accuracy,exact_match,gestalt_score,precision"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage]:
    return demo(tmp_path_factory.mktemp("finished"))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def console_text(plan: Plan, storage: Storage) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    results = collect_results(plan, storage)
    console.print(console_comparison(results))
    print_failures(results, console)
    return console.export_text()


# ---------------------------------------------------------------- names


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
    text = table_csv(collect_results(*finished))
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
    rows = rows_of(table_csv(collect_results(plan, storage)))
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
    assert table_csv(collect_results(turned, storage)) == table_csv(collect_results(plan, storage))


def test_table_does_not_depend_on_clock_or_machine(tmp_path: Path) -> None:
    tables = []
    for started in (1_700_000_000.0, 1_800_000_000.0):
        storage, plan = Storage(tmp_path / str(started)), plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")])
        write_training(storage, plan.runs[0], started=started)
        write_evaluation(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], 0.5, time=started)
        tables.append(table_csv(collect_results(plan, storage)))
    assert tables[0] == tables[1]
    assert len(rows_of(tables[0])) == 1


def test_wilson_bounds() -> None:
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(20 / 40, 40) == (0.351995, 0.648005)
    assert wilson_interval(437 / 1455, 1455) == (0.27734, 0.324398)
    assert wilson_interval(0.0, 50) == (0.0, 0.071348)
    assert wilson_interval(1.0, 1455) == (0.997367, 1.0)


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
    text = table_md(collect_results(*finished))
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


def test_console_fits_into_100_columns(finished: tuple[Plan, Storage]) -> None:
    lines = console_text(*finished).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert sum("r16 3ep" in line for line in lines) == 1  # no name is broken over two lines
    assert any(line.strip() == "smollm2-135m" for line in lines)


# ---------------------------------------------------------------- figures


def test_each_run_is_drawn_from_its_base_on(finished: tuple[Plan, Storage]) -> None:
    plan, storage = finished
    by_step, across, final = draw_scores(collect_results(plan, storage), "sample", "alpaca-ja")
    for metric, figure in by_step.figures.items():
        lines = {trace.meta: trace for trace in figure.data[:5]}  # the first five are 0-shot
        assert list(lines["smollm2-135m lora r16 3ep"].x) == [0, 7, 14, 21]
        base = json.loads((storage.run("base00000004").evaluation(plan.evaluations[0].folder, 0) / "metrics.json").read_text())
        assert lines["smollm2-135m qlora r16 1ep"].y[0] == pytest.approx(base[metric], abs=1e-5)
    assert len(across.figures["accuracy"].data) == 7
    bars = [trace for trace in final.figures["accuracy"].data if trace.type == "bar"]
    assert {trace.name for trace in bars} == {"1 epoch", "3 epochs"}


def test_many_runs_are_limited_to_the_best_and_long_curves_thinned(tmp_path: Path) -> None:
    runs = [run_spec(f"{index:012d}", seed=index, epochs=50) for index in range(DRAWN_RUNS + 5)]
    plan, storage = plan_of([base_spec()], runs, [evaluation_spec(0)]), Storage(tmp_path)
    for index, run in enumerate(runs):
        write_training(storage, run)
        write_evaluation(storage, run.run_key, run.total_steps, plan.evaluations[0], index / len(runs))
    results = collect_results(plan, storage)
    figures = [*draw_scores(results, "sample", "alpaca-ja"), *draw_losses(results)]
    scores = {result.run_key: result.scores[-1].gestalt_score for result in results.tuned}
    kept = sorted(scores.values(), reverse=True)[:DRAWN_RUNS]
    [figure] = figures[-1].figures.values()
    assert len(figure.data) == DRAWN_RUNS
    assert {scores[result.run_key] for result in results.tuned if any(trace.meta == result.name for trace in figure.data)} == set(kept)
    assert f"The {DRAWN_RUNS} best of {len(runs)} runs" in figures[-1].caption
    assert max(len(trace.x) for trace in figure.data) <= 300
    assert len(rows_of(table_csv(results))) == len(runs)


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """Attributes and text of a page; the text of scripts and styles apart."""

    def __init__(self, html: str):
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.code: dict[str, str] = {}
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = f"{tag}#{dict(attrs).get('id', '')}" if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.code[self._inside] = self.code.get(self._inside, "") + data
        else:
            self.text += data


@pytest.fixture(scope="module")
def html(finished: tuple[Plan, Storage]) -> str:
    return write_report(*finished).page.read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_any_server(html: str) -> None:
    page = Page(html)
    assert html.count(get_plotlyjs()) == 1
    own = html.replace(get_plotlyjs(), "")
    assert "http://" not in own
    assert "https://" not in own
    assert "@import" not in own
    assert "url(" not in own
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "data", "poster"}
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed", "base", "form"}
    # the browser is told to refuse them, too, and plotly's own upload button is off
    [policy] = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert "showSendToCloud: false" in page.code["script#"]


def test_the_page_tells_what_it_is_of(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert "For research, not for clinical use" in text
    assert "Synthetic data" in text
    assert "2025-10-09 08:53 UTC to 2025-10-09 09:02 UTC" in text
    assert "5 of 5 runs finished" in re.sub(r"(\d of \d)(runs)", r"\1 \2", text)
    assert "Failed runs" not in text
    assert "Partial" not in text


def test_japanese_stands_as_it_is(html: str) -> None:
    page = Page(html)
    assert "肝臓で産生されて脂肪の消化を助けるのはどれか。" in html
    assert "&#" not in "".join(re.findall(r'lang="ja">[^<]*', html))
    assert ("lang", "ja") in page.attributes
    assert '"Noto Sans CJK JP"' in page.code["style#"]


def test_figures_are_json_for_every_metric(html: str) -> None:
    figures = json.loads(Page(html).code["script#figures"])
    assert [sorted(figure) for figure in figures] == [["accuracy", "exact_match", "gestalt_score"]] * 3 + [["loss"]]
    assert len(re.findall(r'data-figure="\d"', html)) == 4


def test_examples_set_the_base_beside_the_best_run(html: str) -> None:
    cards = re.findall(r'<div class="answer( right)?">\s*<div class="who"><span>([^<]*)</span><span class="verdict">(.)', html)
    assert len(cards) == 6 * 4
    assert {name for _, name, _ in cards[::4]} == {"base fp32"}
    assert {name for _, name, _ in cards[1::4]} == {"lora r16 3ep · best"}
    assert all((right == " right") == (mark == "✓") for right, _, mark in cards)


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")]).model_copy(update={"note": evil})
    storage = Storage(tmp_path)
    write_training(storage, plan.runs[0], steps=3, error=f"boom {evil} | pipe")
    write_evaluation(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], 0.5)
    path = storage.run("aaaaaaaaaaaa").evaluation(plan.evaluations[0].folder, 7) / "predictions.jsonl"
    path.write_text(path.read_text().replace('"response": "', f'"response": "{evil}'))
    files = write_report(plan, storage)
    html = files.page.read_text(encoding="utf-8")
    assert evil not in html
    assert "&lt;/script&gt;" in html
    assert "boom </script><script>alert(1)</script> \\| pipe" in files.table_md.read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is not complete


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
    assert sorted(path.name for path in files.folder.iterdir()) == ["costs.csv", "index.html", "table.csv", "table.md"]
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
    assert [row["model"] for row in rows_of(table_csv(results))] == ["other-1b"] * 8 + ["smollm2-135m"] * 8
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
    assert len(list(files.folder.iterdir())) == 4
