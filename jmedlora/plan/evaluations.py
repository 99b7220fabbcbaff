"""What every checkpoint of a sweep is asked: benchmarks x shots x prompts x ways of scoring."""

from __future__ import annotations

import itertools
import os

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.benchmarks import Benchmark, load_benchmark
from jmedlora.data.files import NotHereYet
from jmedlora.data.prompts import render_prompt
from jmedlora.plan.checks import MAX_NAME_BYTES
from jmedlora.plan.identity import evaluation_key
from jmedlora.plan.specs import EvaluationSpec

SAMPLE_QUESTIONS = 200
"""Questions that are looked at for mean lengths."""
UNKNOWN_QUESTION_CHARACTERS = 250.0
"""Assumed length of a question that is not here yet."""


def plan_evaluations(config: SweepConfig, faults: list[Fault], missing: list[str]) -> list[EvaluationSpec]:
    """Every evaluation of a checkpoint, benchmark by benchmark; what is wrong or not here is appended to `faults` and `missing`."""
    specs: list[EvaluationSpec] = []
    for part in config.benchmarks:
        benchmark: Benchmark | None = None
        try:
            benchmark = load_benchmark(part, config.sources_path)
        except NotHereYet as absent:
            missing.append(str(absent))
        except BadInput as bad:
            faults.extend(bad.faults)
            continue
        before = len(faults)
        if benchmark:
            _check_benchmark(benchmark, config, faults)
        if len(faults) == before:
            specs += _specs(part, benchmark, config)
    _check_names(specs, config, faults)
    return specs


def _check_names(specs: list[EvaluationSpec], config: SweepConfig, faults: list[Fault]) -> None:
    """Each evaluation goes by one name, and a folder can have it."""
    by_key: dict[str, EvaluationSpec] = {}
    for spec in specs:
        if len(os.fsencode(spec.folder)) > MAX_NAME_BYTES:
            told = f"{spec.benchmark.name} and {spec.prompt.name} make the name of a folder of more than {MAX_NAME_BYTES} bytes"
            faults.append(Fault(config.file, "benchmarks", told, "shorter names of benchmark and prompt"))
        first = by_key.setdefault(spec.evaluation_key, spec)
        if first is not spec:
            key = "prompts" if first.benchmark.name == spec.benchmark.name else "benchmarks"
            told = f"{_named(spec)} asks the very same as {_named(first)}"
            faults.append(Fault(config.file, key, told, "each set of questions and each prompt under one name"))


def _named(spec: EvaluationSpec) -> str:
    return f"{spec.benchmark.name} with prompt {spec.prompt.name}"


def _specs(part: BenchmarkConfig, benchmark: Benchmark | None, config: SweepConfig) -> list[EvaluationSpec]:
    digest = benchmark.digest if benchmark else f"not here yet: {part.name}"
    evaluate = config.evaluate
    specs = []
    for name, shots, scoring in itertools.product(config.evaluation_prompts, config.shots, evaluate.scoring):
        prompt = config.prompts[name]
        new_tokens = prompt.max_new_tokens or evaluate.max_new_tokens
        specs.append(
            EvaluationSpec(
                evaluation_key=evaluation_key(part, digest, prompt, shots, scoring, new_tokens),
                benchmark=part,
                benchmark_digest=digest,
                prompt_characters=_prompt_characters(benchmark, prompt, shots),
                questions=len(benchmark.questions) if benchmark else part.declared_questions or 0,
                shots=shots,
                prompt=prompt,
                scoring=scoring,
                metrics=evaluate.metrics,
                max_new_tokens=new_tokens,
                batch_size=evaluate.batch_size,
            )
        )
    return specs


def _check_benchmark(benchmark: Benchmark, config: SweepConfig, faults: list[Fault]) -> None:
    """Enough examples, choices wherever choices are compared, translations wherever a prompt asks in English."""
    name, most = benchmark.name, max(config.shots)
    if most > len(benchmark.examples):
        told = f"{most} is not possible with benchmark {name}, which has {len(benchmark.examples)} examples"
        allowed = f"at most {len(benchmark.examples)}, or more examples (fewshot, fewshot_items)"
        faults.append(Fault(config.file, "shots", told, allowed))
    for prompt in (config.prompts[key] for key in config.evaluation_prompts):
        try:
            for question in [*benchmark.questions, *benchmark.examples[:most]]:
                question.in_language(prompt.language)
        except ValueError as error:
            told = f"prompt {prompt.name} asks in English, and of {name} {error}"
            faults.append(Fault(config.file, "prompts", told, "questions with problem_text_en and choices_en, or another prompt"))


def _prompt_characters(benchmark: Benchmark | None, prompt: PromptConfig, shots: int) -> float:
    if benchmark is None:
        return UNKNOWN_QUESTION_CHARACTERS * (shots + 1)
    examples = [example.in_language(prompt.language).as_instruction() for example in benchmark.examples[:shots]]
    asked = [question.in_language(prompt.language).as_instruction() for question in benchmark.questions[:SAMPLE_QUESTIONS]]
    lengths = [len(render_prompt(prompt, row, examples)) for row in asked]
    return sum(lengths) / len(lengths)
