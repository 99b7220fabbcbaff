"""What is asked and how answers are scored: benchmarks, filters, exam rules, prompts, metric settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from jmedlora.config.parts import COMMIT, FILE_NAME, NAME, REPOSITORY, NamedSource, Number, Part, Text, Whole

# ---------------------------------------------------------------- benchmarks


class GithubSource(Part):
    """A repository on GitHub at a pinned commit: kept as `<sources>/benchmarks/<name>`, fetched there when it is missing."""

    kind: Literal["github"]
    repo: Annotated[str, Field(pattern=REPOSITORY)]
    revision: Annotated[str, Field(pattern=COMMIT)]
    name: Annotated[str, Field(pattern=FILE_NAME)]


class DatasetSource(Part):
    """A file of a data set on the Hugging Face Hub: kept as `<sources>/benchmarks/<name>`, fetched there when it is missing."""

    kind: Literal["dataset"]
    repo: Annotated[str, Field(pattern=REPOSITORY)]
    revision: str | None = None
    """A commit, a tag or a branch; left out: the newest."""
    file: Text
    """Path inside the repository: JSON Lines, a JSON list, CSV or Parquet."""
    name: Annotated[str, Field(pattern=FILE_NAME)]


BenchmarkSource = Annotated[NamedSource | GithubSource | DatasetSource, Field(discriminator="kind")]


class SampleFilter(Part):
    """A random sample of the questions: the same n for the same seed on every machine."""

    n: Annotated[Whole, Field(ge=1)]
    seed: Annotated[Whole, Field(ge=0)] = 0


class Filters(Part):
    """Which questions of a benchmark are taken; filters are applied in this order."""

    years: list[int] | None = None
    sections: list[str] | None = None
    """Letters of an exam's sections, such as B and E."""
    categories: list[str] | None = None
    text_only: bool | None = None
    choices: Annotated[Whole, Field(ge=2)] | None = None
    """Keep questions with exactly this many choices."""
    answers: Annotated[Whole, Field(ge=1)] | None = None
    """Keep questions with exactly this many right answers."""
    items: list[str] | None = None
    """Keep these ids alone."""
    exclude: list[str] = []
    first: Annotated[Whole, Field(ge=1)] | None = None
    """Keep the first n of what is left."""
    sample: SampleFilter | None = None
    """Keep a random sample of what is left."""


class ExamRules(Part):
    """How the exam itself is marked; empty values mean that the exam has no such rule."""

    always_correct: list[str] = []
    """Ids of questions for which every answer counts."""
    required_sections: list[str] = []
    """Letters of the sections that must be passed by themselves."""
    required_share: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of the points that the required sections ask for."""
    max_prohibited: Annotated[Whole, Field(ge=0)] | None = None
    """Most prohibited choices that a candidate may pick; more fail the exam."""
    pass_points: dict[int, Annotated[Number, Field(ge=0)]] = {}
    """Points that pass the other sections, by year; years without an entry are not judged by points."""


class BenchmarkConfig(Part):
    """A question set, with the examples that few-shot prompts may use."""

    name: Annotated[str, Field(pattern=NAME)]
    path: Text | None = None
    """A file of questions, or a folder: an IgakuQA checkout (`data/<year>/*.jsonl`) or one of its year folders."""
    bundled: str | None = None
    source: BenchmarkSource | None = None
    format: Literal["questions", "jmedbench"] = "questions"
    """`questions`: IgakuQA's keys (JSON Lines or CSV); `jmedbench`: sample_id, question, options, answer_idx."""
    fewshot: str | None = None
    """A file of examples in the same format; for an IgakuQA checkout its own three are found without this."""
    fewshot_bundled: str | None = None
    fewshot_items: list[str] = []
    """Ids of questions of the benchmark itself to be used as examples; these are then not evaluated."""
    filters: Filters = Filters()
    shuffle: Annotated[Whole, Field(ge=0)] | None = None
    """Seed of a random order of each question's choices; left out: the order of the source."""
    exam: ExamRules | None = None
    declared_questions: Annotated[Whole, Field(ge=1)] | None = None
    note: str = ""


# ---------------------------------------------------------------- prompts


class PromptConfig(Part):
    """A Jinja2 template that asks one question, and how its answer is to be read.

    Variables: `instruction` (the question), `input` (the choices' texts joined by a comma), `choices` (their list, empty
    for training rows without any), `letters` (their letters), `count` (how many answers are right), and `examples`, each
    with the same and with `output` (the right choices' texts) and `answer` (the answer in the form that the prompt asks for).
    """

    name: Annotated[str, Field(pattern=NAME)]
    template: Text
    answer: Literal["text", "letters"] = "text"
    """What the model is asked for: the right choice's text, or its letter."""
    language: Literal["ja", "en"] = "ja"
    """`en` asks the benchmark's English translation."""
    chat: bool = False
    """Put the rendered text into the model's own chat template as the user's message, examples as earlier turns."""
    system: str = ""
    """System message of a chat prompt."""
    answer_marker: str | None = None
    """The answer is what follows the last of these marks in the response; generation goes on over line breaks until it is there."""
    answer_prefix: str = ""
    """What stands between the prompt and its answer, such as the blank after `Answer:`."""
    max_new_tokens: Annotated[Whole, Field(ge=1)] | None = None
    """In place of the sweep's `evaluate.max_new_tokens`, where a prompt asks for more than the answer."""
    note: str = ""


# ---------------------------------------------------------------- scoring

ScoringWay = Literal["generate", "loglikelihood"]
SCORING_WAYS: tuple[ScoringWay, ...] = ("generate", "loglikelihood")


class MetricSettings(Part):
    """How a stored prediction is scored; recorded with every result. The defaults are the study's wording, taken literally."""

    autojunk: bool = False
    """difflib's heuristic that ignores frequent characters once the second string has 200 or more."""
    order: Literal["response_choice", "choice_response", "mean"] = "response_choice"
    """Order of the two arguments of the ratio, which is not symmetric; `mean` is the mean of both."""
    first_line: bool = True
    """Score only the first line of the response."""
    nfkc: bool = False
    """Compare after Unicode normalisation NFKC."""
    remove_full_stops: bool = False
    """Remove every ASCII full stop from the response and from the right answer, not from the choices."""
    multiple: Literal["top_k", "top_1"] = "top_k"
    """With k right answers: the k nearest choices must be exactly those, or the nearest one must be among them."""
    ties: Literal["first", "last", "wrong"] = "first"
    """Equally near choices: the earlier one is taken, or the later one, or the question counts as wrong where the tie decides."""
    loglikelihood: Literal["sum", "per_token", "per_character", "per_byte"] = "sum"
    """What a choice's log-likelihood is divided by before choices are compared."""


def _named_metrics(value: Any) -> Any:
    """A variant's name, or a mapping that may build on one (`preset: harness`), as the settings themselves."""
    name, changes = (value.get("preset", "default"), value) if isinstance(value, dict) else (value, {})
    if isinstance(value, MetricSettings):
        return value
    if not isinstance(name, str) or name not in METRIC_VARIANTS:
        keys = ", ".join(MetricSettings.model_fields)
        raise PydanticCustomError("metric_variant", "{allowed}", {"allowed": f"{', '.join(METRIC_VARIANTS)}, or a mapping of {keys}"})
    return {**METRIC_VARIANTS[name].model_dump(), **{key: setting for key, setting in changes.items() if key != "preset"}}


DEFAULT_METRICS = MetricSettings()
HARNESS_METRICS = MetricSettings(autojunk=True, order="mean", remove_full_stops=True)
METRIC_VARIANTS = {"default": DEFAULT_METRICS, "harness": HARNESS_METRICS}
"""Named settings; `harness` is what the study's authors published later."""

NamedMetrics = Annotated[MetricSettings, BeforeValidator(_named_metrics)]
"""Metric settings in a configuration: a variant's name, or settings one by one."""
