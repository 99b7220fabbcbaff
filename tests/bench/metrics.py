"""Speed of the batch scorer against plain difflib, with every score compared bit for bit: `python -m tests.bench.metrics`.

Questions are IgakuQA's text-only five-choice ones where JMEDLORA_SHARED_DATA is set, else the bundled sample; responses of
mixed quality are made by a seeded generator. Both sides are timed in turn (ABAB …) in one process.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import os
import platform
import random
import statistics
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jmedlora.config.benchmark import METRIC_VARIANTS, BenchmarkConfig, Filters, MetricSettings
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.rows import Question
from jmedlora.evaluation.metrics import ResponseScore, Scorer, first_line, score_responses

LENGTHS = (20, 60, 250)

Score = Callable[[list[str]], list[ResponseScore]]


@dataclass(frozen=True)
class Measurement:
    """One line of the table; `ratio` is the median of the rounds' ratios of times, `spread` their smallest and largest."""

    name: str
    baseline: str
    ratio: float
    spread: tuple[float, float]
    exactness: str
    microseconds: float
    """Median processor time per response of what is measured."""
    baseline_microseconds: float
    rounds: int
    machine: str


def plain_distance(response: str, choice: str, settings: MetricSettings) -> float:
    """The Gestalt distance as difflib computes it."""
    forward = difflib.SequenceMatcher(None, response, choice, settings.autojunk).ratio()
    backward = difflib.SequenceMatcher(None, choice, response, settings.autojunk).ratio() if settings.order != "response_choice" else 0.0
    return {"response_choice": forward, "choice_response": backward, "mean": (backward + forward) / 2}[settings.order]


def plain_score(response: str, question: Question, settings: MetricSettings) -> ResponseScore:
    """The metrics' definition written down with nothing but difflib: every choice compared, none passed over."""
    text = first_line(response) if settings.first_line else response
    text = unicodedata.normalize("NFKC", text) if settings.nfkc else text
    text = (text.replace(".", "") if settings.remove_full_stops else text).strip()
    choices = [unicodedata.normalize("NFKC", choice) if settings.nfkc else choice for choice in question.choices]
    accepted = (question.gold, *question.alternatives)
    answers = [",".join(choices[i] for i in gold) for gold in accepted]
    answers = [answer.replace(".", "") if settings.remove_full_stops else answer for answer in answers]
    distances = [plain_distance(text, choice, settings) for choice in choices]
    count = 1 if settings.multiple == "top_1" else len(question.gold)
    later_first = -1 if settings.ties == "last" else 1
    ranking = sorted(range(len(choices)), key=lambda i: (-distances[i], later_first * i))
    chosen = tuple(sorted(ranking[:count]))
    correct = any(chosen[0] in gold for gold in accepted) if settings.multiple == "top_1" else chosen in accepted
    if settings.ties == "wrong" and count < len(choices) and distances[ranking[count - 1]] == distances[ranking[count]]:
        correct = False
    exact = any(text == answer.strip() for answer in answers)
    return ResponseScore(text, chosen, correct, exact, max(plain_distance(text, answer, settings) for answer in answers))


def plain_scores(responses: Sequence[str], questions: Sequence[Question], settings: MetricSettings) -> list[ResponseScore]:
    return [plain_score(response, question, settings) for response, question in zip(responses, questions, strict=True)]


def real_or_sample_questions() -> tuple[str, list[Question]]:
    """What is asked, and its name."""
    place = os.environ.get("JMEDLORA_SHARED_DATA")
    if not place:
        return "sample", load_benchmark(BenchmarkConfig(name="sample", bundled="sample/questions.jsonl"), Path()).questions
    config = BenchmarkConfig(name="igakuqa", path=str(Path(place) / "igakuqa"), filters=Filters(text_only=True, choices=5))
    return "IgakuQA", load_benchmark(config, Path()).questions


def made_up_responses(questions: Sequence[Question], length: int, seed: int) -> list[str]:
    """A response of about `length` characters per question: right, wrong, several, misspelt or beside the point, in running text."""
    chance = random.Random(seed)
    responses = []
    for question in questions:
        kind = chance.choice(["right", "wrong", "several", "misspelt", "beside"])
        named = {
            "right": question.answer,
            "wrong": chance.choice(question.choices),
            "several": ",".join(chance.sample(question.choices, 2)),
            "misspelt": "".join(chance.choice(question.text) if chance.random() < 0.2 else letter for letter in question.answer),
            "beside": "",
        }[kind]
        around = "".join(f"{other.answer}は{other.text}" for other in chance.sample(questions, 3)).replace("\n", "")
        room = max(0, int(chance.gauss(length, length / 5)) - len(named))
        before = chance.choice([0, room // 3])
        responses.append(around[:before] + named + around[before:room])
    return responses


def compare(name: str, questions: Sequence[Question], rounds: Sequence[list[str]], settings: MetricSettings, score: Score) -> Measurement:
    """Times both in turn, each round on responses of its own, and compares what they return."""
    seconds: tuple[list[float], list[float]] = ([], [])
    equal = total = 0
    gc.collect()
    gc.disable()  # as timeit does: when the collector runs depends on all that lies in memory
    for responses in rounds:
        results = []
        for side, work in enumerate((lambda given: plain_scores(given, questions, settings), score)):
            # Processor time, not the clock's: others may be at work on the machine, and both sides have one thread.
            started = time.process_time()
            results.append(work(responses))
            seconds[side].append(time.process_time() - started)
        equal += sum(one == other for one, other in zip(*results, strict=True))
        total += len(responses)
    gc.enable()
    ratios = [slow / quick for slow, quick in zip(*seconds)]
    plain, fast = (round(statistics.median(side) / len(questions) * 1e6, 1) for side in seconds)
    return Measurement(
        name=name,
        baseline="plain difflib",
        ratio=round(statistics.median(ratios), 2),
        spread=(round(min(ratios), 2), round(max(ratios), 2)),
        exactness=f"{equal} of {total} scores equal bit for bit",
        microseconds=fast,
        baseline_microseconds=plain,
        rounds=len(rounds),
        machine=machine(),
    )


def machine() -> str:
    """Processor, cores, Python and system of this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


def measure(rounds: int, seed: int) -> list[Measurement]:
    """The batch function as it is called for one evaluation, and a scorer that is kept for many."""
    source, questions = real_or_sample_questions()
    measurements = []
    for length in LENGTHS:
        responses = [made_up_responses(questions, length, seed + i) for i in range(rounds)]
        for variant, settings in METRIC_VARIANTS.items():
            ways: dict[str, Score] = {
                "score_responses": partial(score_responses, questions=questions, settings=settings),
                "kept Scorer": Scorer(questions, settings).score,
            }
            for way, score in ways.items():
                name = f"{way}, {variant} settings, about {length} characters, {len(questions)} {source} questions"
                measurements.append(compare(name, questions, responses, settings, score))
    return measurements


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", type=Path, help="write the measurements into this file")
    given = arguments.parse_args()
    measurements = measure(given.rounds, given.seed)
    table = Table("what", "µs a response", "plain difflib", "times faster", "smallest to largest", "exactness")
    for row in measurements:
        low, high = row.spread
        cells = [f"{row.microseconds:.1f}", f"{row.baseline_microseconds:.1f}", f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(row.name, *cells, row.exactness)
    console = Console(width=160)
    console.print(table)
    console.print(f"{given.rounds} rounds, {measurements[0].machine}")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in measurements], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
