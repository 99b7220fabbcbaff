"""Which comparisons speak to which claim of the study: systems of a sweep paired up."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec
from jmedlora.report.collect import Results, RunResult
from jmedlora.report.comparison import last_score
from jmedlora.report.evidence import Board, Contrast, Point, Reading, evaluations_name

SAME_SIZE = 1.2
"""Models whose parameters differ by a smaller factor count as equally large."""
LARGER = 1.5
"""A model is called larger from this factor on."""
LARGE_PARAMETERS, SMALL_PARAMETERS = 40e9, 13e9
"""What stands for the study's 70B and 7B: at least the first, at most the second."""
ONE_EPOCH, MORE_EPOCHS = (0.9, 1.1), 1.5
_NOT_SETTINGS = {"model", "epochs", "max_steps", "alpha", "deepspeed", "micro_batch_size", "gradient_checkpointing"}


# ---------------------------------------------------------------- systems


def final_point(result: RunResult, evaluation: EvaluationSpec) -> Point | None:
    """The system at its last evaluated step."""
    score = last_score(result, evaluation)
    return Point(result, score.step) if score else None


def equal_settings(spec: RunSpec) -> str:
    """What two runs share that differ in nothing but model and duration."""
    values = spec.settings.model_dump(mode="json", exclude=_NOT_SETTINGS)
    values |= {"alpha": spec.settings.alpha_value, "data": spec.data_digest, "prompt": spec.prompt.template, "precision": spec.precision}
    return json.dumps(values, sort_keys=True)


def points_by_epoch(results: Results) -> list[dict[float, Point]]:
    """For each set of equal settings: the system after each whole epoch and after each duration, by epochs.

    Where runs of several durations exist, the run that ends there is taken; else a checkpoint on the way of the longest.
    """
    groups: dict[tuple[str, str], dict[float, Point]] = {}
    for result in sorted(results.tuned, key=lambda result: -result.last_step):
        spec = result.spec
        if not isinstance(spec, RunSpec):
            continue
        group = groups.setdefault((spec.base_key, equal_settings(spec)), {})
        for step in {score.step for score in result.scores}:
            epochs = round(step / spec.steps_per_epoch, 4)
            if step == spec.total_steps or (step % spec.steps_per_epoch == 0 and epochs not in group):
                group[epochs] = Point(result, step)
    return [dict(sorted(group.items())) for group in groups.values()]


def pretraining_pairs(results: Results) -> list[tuple[RunResult, RunResult]]:
    """OpenCALM beside MedCALM of the same size with equal settings: runs with runs of one duration, bases with bases.

    MedCALM is known by its name: the study published neither weights nor a model card that could say what it was made from.
    """
    plain = [result for result in results.runs if result.model.lower().startswith(("open-calm", "opencalm"))]
    more = [result for result in results.runs if result.model.lower().startswith("medcalm")]
    return [(one, other) for one in plain for other in more if _are_alike(one.spec, other.spec)]


def _are_alike(one: RunSpec | BaseSpec, other: RunSpec | BaseSpec) -> bool:
    if _factor(one, other) >= SAME_SIZE or one.precision != other.precision:
        return False
    if isinstance(one, RunSpec) and isinstance(other, RunSpec):
        return equal_settings(one) == equal_settings(other) and one.total_steps == other.total_steps
    return isinstance(one, BaseSpec) and isinstance(other, BaseSpec)


def _factor(one: RunSpec | BaseSpec, other: RunSpec | BaseSpec) -> float:
    sizes = sorted((one.model_parameters, other.model_parameters))
    return sizes[1] / sizes[0] if sizes[0] else float("inf")


# ---------------------------------------------------------------- contrasts

Pair = tuple[Point, Point, EvaluationSpec]


def against_base(results: Results, board: Board, evaluations: Sequence[EvaluationSpec], runs: Sequence[RunResult]) -> list[Pair]:
    """(base, run, evaluation) wherever the answers of both are stored."""
    pairs = []
    for evaluation in evaluations:
        for run in runs:
            base = results.base_of(run)
            before = final_point(base, evaluation) if base else None
            after = final_point(run, evaluation)
            if before and after and board.has(before, evaluation) and board.has(after, evaluation):
                pairs.append((before, after, evaluation))
    return pairs


def contrast_of(pairs: Sequence[Pair], first_name: str, second_name: str, decides: bool = False) -> Contrast:
    return Contrast(
        first_name,
        second_name,
        evaluations_name([evaluation for _, _, evaluation in pairs]),
        decides,
        [((1, first, evaluation),) for first, _, evaluation in pairs],
        [((1, second, evaluation),) for _, second, evaluation in pairs],
    )


def _with_parts(pairs: Sequence[Pair], first_name: str, second_name: str) -> list[Contrast]:
    """All pairs together, which decides; then each second system by itself, and each evaluation by itself."""
    if not pairs:
        return []
    contrasts = [contrast_of(pairs, first_name, second_name, decides=True)]
    by_system: dict[tuple[str, str], list[Pair]] = {}
    by_evaluation: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_system.setdefault((_point_name(pair[0]), _point_name(pair[1])), []).append(pair)
        by_evaluation.setdefault(pair[2].evaluation_key, []).append(pair)
    if len(by_system) > 1:
        contrasts += [contrast_of(own, *names) for names, own in by_system.items()]
    if len(by_evaluation) > 1:
        contrasts += [contrast_of(own, first_name, second_name) for own in by_evaluation.values()]
    return contrasts


def _point_name(point: Point) -> str:
    name = point.result.name
    return name if point.step == point.result.last_step else f"{name}, step {point.step}"


def tuning_improves(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    return _with_parts(against_base(results, board, evaluations, results.tuned), "the bases", "the tuned models")


def larger_gains_more(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    """Gains of the largest model against those of the smallest; then of every larger model against the smallest."""
    pairs = against_base(results, board, evaluations, results.tuned)
    sizes = {pair[1].result.model: pair[1].result.spec.model_parameters for pair in pairs}
    if not sizes or max(sizes.values()) < LARGER * min(sizes.values()):
        return []
    smallest = [model for model, size in sizes.items() if size <= SAME_SIZE * min(sizes.values())]
    largest = [model for model, size in sizes.items() if size >= max(sizes.values()) / SAME_SIZE]
    larger = [[model] for model, size in sizes.items() if size >= LARGER * min(sizes.values())]
    contrasts = [_gains(pairs, smallest, largest, decides=True)]
    if larger != [largest]:
        contrasts += [_gains(pairs, smallest, models, decides=False) for models in larger]
    return [contrast for contrast in contrasts if contrast.first and contrast.second]


def _gains(pairs: Sequence[Pair], smaller: list[str], larger: list[str], decides: bool) -> Contrast:
    def asked(models: list[str]) -> set[str]:
        return {evaluation.evaluation_key for _, run, evaluation in pairs if run.result.model in models}

    shared = asked(smaller) & asked(larger)

    def gains(models: list[str]) -> list[Reading]:
        return [
            ((1, run, evaluation), (-1, base, evaluation))
            for base, run, evaluation in pairs
            if run.result.model in models and evaluation.evaluation_key in shared
        ]

    over = list({evaluation.evaluation_key: evaluation for _, _, evaluation in pairs if evaluation.evaluation_key in shared}.values())
    first, second = (f"gain of {' and '.join(models)}" for models in (smaller, larger))
    return Contrast(first, second, evaluations_name(over) if over else "", decides, gains(smaller), gains(larger))


def one_epoch_helps(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    pairs = []
    for group in points_by_epoch(results):
        for point in (point for epochs, point in group.items() if ONE_EPOCH[0] <= epochs <= ONE_EPOCH[1]):
            base = results.base_of(point.result)
            pairs += _stored(board, Point(base, 0) if base else None, point, evaluations)
    return _with_parts(pairs, "the bases", "the models after one epoch")


def more_epochs_hurt(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    """The longest duration of equal settings against one epoch decides; beside it each number of epochs."""
    longest: list[Pair] = []
    by_epochs: dict[float, list[Pair]] = {}
    for group in points_by_epoch(results):
        one = next((point for epochs, point in group.items() if ONE_EPOCH[0] <= epochs <= ONE_EPOCH[1]), None)
        later = {
            epochs: pairs for epochs, point in group.items() if epochs >= MORE_EPOCHS and (pairs := _stored(board, one, point, evaluations))
        }
        for epochs, pairs in later.items():
            by_epochs.setdefault(epochs, []).extend(pairs)
        longest += later[max(later)] if later else []
    contrasts = _with_parts(longest, "after one epoch", "after the most epochs")
    if len(by_epochs) > 1:
        contrasts += [contrast_of(by_epochs[epochs], "after one epoch", f"after {epochs:g} epochs") for epochs in sorted(by_epochs)]
    return contrasts


def _stored(board: Board, first: Point | None, second: Point, evaluations: Sequence[EvaluationSpec]) -> list[Pair]:
    if first is None:
        return []
    return [(first, second, item) for item in evaluations if board.has(first, item) and board.has(second, item)]


def pretraining(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    pairs = []
    for plain, more in pretraining_pairs(results):
        for evaluation in evaluations:
            first, second = final_point(plain, evaluation), final_point(more, evaluation)
            if first and second and first.step == second.step:
                pairs += _stored(board, first, second, [evaluation])
    return _with_parts(pairs, "without additional pretraining", "with additional pretraining")


def is_neox(result: RunResult) -> bool:
    return result.spec.model.family == "gpt_neox"


def one_shot_declines(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    runs = [result for result in results.tuned if is_neox(result)]
    return _with_parts(against_base(results, board, with_shots(evaluations, 1), runs), "1-shot before tuning", "1-shot after tuning")


def with_shots(evaluations: Sequence[EvaluationSpec], shots: int) -> list[EvaluationSpec]:
    return [item for item in evaluations if item.shots == shots]


def example_helps_less(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    return _example_gains(results, board, evaluations, [result for result in results.tuned if is_neox(result)])


def _example_gains(results: Results, board: Board, evaluations: Sequence[EvaluationSpec], runs: Sequence[RunResult]) -> list[Contrast]:
    """1-shot minus 0-shot, after tuning against before; only where a run has both after the same step."""
    readings: list[tuple[str, EvaluationSpec, Reading, Reading]] = []
    for one in with_shots(evaluations, 1):
        for zero in (item for item in with_shots(evaluations, 0) if _same_but_for_shots(one, item)):
            steps = {run.result.run_key: run.step for _, run, _ in against_base(results, board, [zero], runs)}
            for base, run, _ in against_base(results, board, [one], runs):
                if steps.get(run.result.run_key) == run.step:
                    readings.append((run.result.name, one, ((1, base, one), (-1, base, zero)), ((1, run, one), (-1, run, zero))))
    names = list(dict.fromkeys(name for name, *_ in readings))
    groups = [(names, True), *(([name], False) for name in names if len(names) > 1)]
    contrasts = []
    for chosen, decides in groups:
        own = [each for each in readings if each[0] in chosen]
        over = evaluations_name([each[1] for each in own]) if own else ""
        who = "" if decides else f", {chosen[0]}"
        before, after = (f"1-shot minus 0-shot {when} tuning{who}" for when in ("before", "after"))
        contrasts.append(Contrast(before, after, over, decides, [each[2] for each in own], [each[3] for each in own]))
    return [contrast for contrast in contrasts if contrast.first]


def _same_but_for_shots(one: EvaluationSpec, other: EvaluationSpec) -> bool:
    return (one.benchmark_digest, one.prompt.name, one.scoring) == (other.benchmark_digest, other.prompt.name, other.scoring)


def english_beats_japanese(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    """Tuned models where both sides have some, else the models as they are, which otherwise stand beside."""
    large = [result for result in results.runs if _speaks(result, "english") and result.spec.model_parameters >= LARGE_PARAMETERS]
    small = [result for result in results.runs if _speaks(result, "japanese") and 0 < result.spec.model_parameters <= SMALL_PARAMETERS]
    contrasts: list[Contrast] = []
    for tuned in (True, False):
        sides = [[result for result in side if result.is_base != tuned] for side in (small, large)]
        state = "tuned" if tuned else "as they are"
        decides = not contrasts
        own = _sides(board, evaluations, sides, state, decides)
        contrasts += own
        if own and len(evaluations) > 1:
            contrasts += [each for item in evaluations for each in _sides(board, [item], sides, state, False)]
    return contrasts


def _speaks(result: RunResult, language: str) -> bool:
    return language in result.spec.model.language.lower()


def _sides(board: Board, evaluations: Sequence[EvaluationSpec], sides: list[list[RunResult]], state: str, decides: bool) -> list[Contrast]:
    readings: list[list[Reading]] = [[], []]
    over = []
    for evaluation in evaluations:
        found = [
            [point for result in side if (point := final_point(result, evaluation)) and board.has(point, evaluation)] for side in sides
        ]
        if all(found):
            over.append(evaluation)
            for own, points in zip(readings, found, strict=True):
                own += [((1, point, evaluation),) for point in points]
    if not over:
        return []
    models = [" and ".join(dict.fromkeys(result.model for result in side)) for side in sides]
    first, second = (f"{model}, {state}" for model in models)
    return [Contrast(first, second, evaluations_name(over), decides, *readings)]
