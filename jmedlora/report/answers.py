"""Stored evaluations question by question, as arrays: what statistics and claims are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jmedlora.plan.layout import PREDICTIONS, Storage
from jmedlora.plan.records import damaged, read_predictions
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import METRICS, Metric


@dataclass(frozen=True)
class Answers:
    """How one system scored on each question of an evaluation; everything in the questions' order."""

    problem_ids: tuple[str, ...]
    correct: np.ndarray
    """(questions,), truth values; of pooled answers their mean."""
    exact_match: np.ndarray
    """(questions,), truth values; of pooled answers their mean."""
    gestalt_score: np.ndarray
    """(questions,), from 0 to 1."""

    def scores(self, metric: Metric) -> np.ndarray:
        """(questions,) as float64; their mean is the metric."""
        return self._stored(metric).astype(np.float64)

    def is_share(self, metric: Metric) -> bool:
        """True where every question is right or wrong."""
        return self._stored(metric).dtype == np.bool_

    def _stored(self, metric: Metric) -> np.ndarray:
        return {"accuracy": self.correct, "exact_match": self.exact_match, "gestalt_score": self.gestalt_score}[metric]


class AnswerBook:
    """Answers of stored evaluations, each file read once; ten bytes a question are kept, and every set of ids but once."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._kept: dict[tuple[str, int, str], Answers | None] = {}
        self._ids: dict[tuple[str, ...], tuple[str, ...]] = {}

    def of(self, run_key: str, step: int, evaluation: EvaluationSpec) -> Answers | None:
        """The answers of a run or base after `step` steps; None where no predictions are stored."""
        key = run_key, step, evaluation.folder
        if key not in self._kept:
            self._kept[key] = self.read(run_key, step, evaluation)
        return self._kept[key]

    def read(self, run_key: str, step: int, evaluation: EvaluationSpec) -> Answers | None:
        """Like `of`, for what is asked for once: nothing is kept. Raises BadInput for a file that is damaged."""
        rows = read_predictions(self._storage, run_key, step, evaluation)
        if not rows:
            return None
        try:
            ids = tuple(row["problem_id"] for row in rows)
            correct = np.array([row["correct"] for row in rows], dtype=bool)
            exact_match = np.array([row["exact_match"] for row in rows], dtype=bool)
            gestalt_score = np.array([row["gestalt_score"] for row in rows], dtype=np.float64)
        except KeyError as missing:
            folder = self._storage.run(run_key).evaluation(evaluation.folder, step)
            remedy = f"delete the folder {folder}: the sweep makes it again"
            raise damaged(str(folder / PREDICTIONS), f"a line without {missing.args[0]}", remedy) from None
        return Answers(self._ids.setdefault(ids, ids), correct, exact_match, gestalt_score)


def shared_questions(first: Answers, second: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `first` and in `second` of the questions that both answered, in the order of `first`; (shared,) each."""
    if first.problem_ids is second.problem_ids:
        everything = np.arange(len(first.problem_ids))
        return everything, everything
    places = {problem: place for place, problem in enumerate(second.problem_ids)}
    pairs = [(place, places[problem]) for place, problem in enumerate(first.problem_ids) if problem in places]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def pooled(members: Sequence[Answers]) -> Answers:
    """The mean of several systems, question by question, on the questions that all of them answered."""
    ids = members[0].problem_ids
    places = [np.arange(len(ids)) for _ in members]
    for number, other in enumerate(members[1:], start=1):
        own, theirs = shared_questions(members[0], other)
        shared, kept, found = np.intersect1d(places[0], own, return_indices=True)
        places = [place[kept] for place in places]
        places[0], places[number] = shared, theirs[found]
    if len(places[0]) < len(ids):
        ids = tuple(ids[place] for place in places[0])
    means = {
        metric: np.mean([member.scores(metric)[place] for member, place in zip(members, places, strict=True)], axis=0) for metric in METRICS
    }
    return Answers(ids, means["accuracy"], means["exact_match"], means["gestalt_score"])
