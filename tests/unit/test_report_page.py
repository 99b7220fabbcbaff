"""The report's figures and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.report.axes import Label, place_labels, score_range
from jmedlora.report.collect import collect_results
from jmedlora.report.figures import DRAWN_RUNS, draw_losses, draw_scores
from jmedlora.report.writer import analyse, write_report
from tests.made_up import base_spec, demo, evaluation_spec, plan_of, run_spec, write_answers, write_evaluation, write_training
from tests.reading import Page, rows_of, table_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage]:
    return demo(tmp_path_factory.mktemp("finished"))


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


@pytest.mark.parametrize(("right", "low", "high"), [(0, -0.02, 0.05), (12, 0.25, 0.35), (40, 0.95, 1.02)])
def test_axes_of_equal_scores_stay_with_them(tmp_path: Path, right: int, low: float, high: float) -> None:
    plan, storage = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")]), Storage(tmp_path)
    for key, step in (("base00000032", 0), ("aaaaaaaaaaaa", 7)):
        for evaluation in plan.evaluations:
            write_answers(storage, key, step, evaluation, [index < right for index in range(40)])
    by_step, across, final = (each.figures["accuracy"] for each in draw_scores(collect_results(plan, storage), "sample", "alpaca-ja"))
    axes = [*by_step.select_yaxes(), *across.select_xaxes(), *across.select_yaxes()]
    assert [axis.range for axis in axes] == [pytest.approx((low, high))] * 4
    assert {axis.range for axis in final.select_yaxes()} == {(0, final.layout.yaxis.range[1])}
    assert right / 40 < final.layout.yaxis.range[1] <= 1.02


@given(st.lists(st.floats(0, 1), max_size=5))
def test_axes_hold_their_scores_and_stay_within_what_scores_can_be(values: list[float]) -> None:
    low, high = score_range(values)
    assert -0.02 <= low < high <= 1.02
    assert all(low < value < high for value in values)


def test_bars_leave_room_for_their_intervals(finished: tuple[Plan, Storage]) -> None:
    final = draw_scores(analyse(*finished)[0], "sample", "alpaca-ja")[-1].figures["accuracy"]
    bars = [trace for trace in final.data if trace.type == "bar"]
    ends = [y + up for bar in bars for y, up in zip(bar.y, bar.error_y.array, strict=True) if y is not None]
    assert max(ends) < final.layout.yaxis.range[1] < max(ends) + 0.2


def test_labels_of_runs_that_coincide_are_not_written_on_one_another(tmp_path: Path) -> None:
    plan, storage = plan_of([base_spec()], [run_spec(f"{rank:012d}", rank=rank) for rank in (2, 4, 8)]), Storage(tmp_path)
    for key, step, right in (("base00000032", 0, 12), ("000000000002", 7, 12), ("000000000004", 7, 12), ("000000000008", 7, 24)):
        for evaluation in plan.evaluations:
            write_answers(storage, key, step, evaluation, [index < right for index in range(40)])
    across = draw_scores(collect_results(plan, storage), "sample", "alpaca-ja")[1].figures["accuracy"]
    told = {trace.text[-1]: trace.textposition for trace in across.data if trace.text}
    at_one_point = {"base": "top center", "lora r2 1ep": "bottom center", "lora r4 1ep": "middle right"}
    assert told == at_one_point | {"lora r8 1ep": "top center"}
    assert len({trace.meta for trace in across.data}) == 4  # every point is drawn, and tells its name when pointed at


def test_labels_take_the_sides_that_are_free() -> None:
    def sides(*points: tuple[float, float], limits: tuple[float, float] = (0.2, 0.6)) -> list[str | None]:
        labels = [Label(go.Scatter(x=[x], y=[y]), (x, y), "lora r16 3ep") for x, y in points]
        place_labels(labels, limits)
        return [label.trace.textposition for label in labels]

    assert sides((0.4, 0.4), (0.3, 0.5)) == ["top center"] * 2
    assert sides(*[(0.4, 0.4)] * 5) == ["top center", "bottom center", "middle right", "middle left", None]
    assert sides((0.4, 0.4), (0.4, 0.43)) == ["bottom center", "top center"]  # no label on another point
    assert sides((0.0, 0.0), (1.0, 1.0), limits=(-0.02, 1.02)) == ["middle right", "middle left"]


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
    assert len(rows_of(table_of(plan, storage))) == len(runs)


# ---------------------------------------------------------------- the page


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
