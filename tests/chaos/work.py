"""What the simulated processes work on: training and decoding that cost nothing, and nothing else that is made up.

The loops around them are the program's own: `train_trial` with its leases, records, checkpoints and states, and the evaluator
with its journal and results. Only the model is missing: an adapter is a handful of numbers that follow from the run's
trajectory, step by step, so that one which goes on from a wrong state ends as another adapter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from jmedlora.data.benchmarks import load_benchmark
from jmedlora.evaluation.batching import answer_in_batches
from jmedlora.evaluation.evaluator import Evaluator, _Task
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.results import Answers, asked_rows
from jmedlora.models.lora import ADAPTER
from jmedlora.plan.checksums import adapter_digest, verify
from jmedlora.plan.layout import ADAPTER_WEIGHTS
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec
from jmedlora.training.process import Worker
from jmedlora.training.run import BaseModel, _Wishes
from tests.chaos.world import World

NUMBERS = 12
BATCH_S = 0.7
"""Less than what a journal waits for before it writes: every other batch is written."""


class Work:
    """Counts what is done; everything takes its time in the world."""

    def __init__(self, world: World, step_s: float):
        self.world = world
        self.step_s = step_s
        self.steps: Counter[str] = Counter()
        """Optimizer steps taken, by run."""
        self.answered: Counter[tuple[str, str]] = Counter()
        """Questions answered, by adapter and evaluation."""
        self.opened: set[Path] = set()
        """Checkpoints that an evaluation has read: nobody looks again at whether they are whole."""

    # -- training

    @staticmethod
    def load_base(*_: object) -> BaseModel:
        return BaseModel(SimpleNamespace(), SimpleNamespace(pad_token_id=0), "")  # type: ignore[arg-type]

    @staticmethod
    def this_worker() -> Worker:
        return Worker(0, 1, torch.device("cpu"))

    class TrainingSet:
        def __init__(self, spec: RunSpec, base: BaseModel, sources: Path):
            self.lengths = np.ones(spec.rows, dtype=np.int64)
            self.truncated = 0

    @staticmethod
    @contextmanager
    def adapter(spec: RunSpec, model: Any, worker: Worker, steps: int, state: dict[str, torch.Tensor] | None) -> Iterator[Any]:
        config = LoraConfig(r=spec.settings.rank, target_modules=["q_proj", "v_proj"])
        yield SimpleNamespace(peft_config={ADAPTER: config}), Numbers(spec, steps, state), None

    def train_step(
        self, spec: RunSpec, step: int, rows: Any, batches: Any, engine: Numbers, *others: Any
    ) -> tuple[dict[str, Any], _Wishes]:
        wishes: _Wishes = others[-1]
        self.world.sleep(self.step_s)
        self.steps[spec.run_key] += 1
        loss = engine.step(step)
        record = {"step": step, "epoch": step / spec.steps_per_epoch, "loss": loss, "learning_rate": spec.settings.learning_rate}
        return record | {"grad_norm": 1.0, "tokens": 100, "seconds": self.step_s, "time": self.world.time()}, wishes

    # -- evaluation

    def make_evaluator(self, base: BaseSpec, sources: Path, offline: bool) -> Evaluator:
        self.world.sleep(BATCH_S)
        return _Answerer(base, sources, self._answer, self.opened)

    def _answer(self, numbers: torch.Tensor, digest: str | None, evaluation: EvaluationSpec, question: Any) -> str:
        self.answered[(digest or "", evaluation.evaluation_key)] += 1
        drawn = hashlib.sha256(numbers.numpy().tobytes() + question.problem_id.encode() + evaluation.evaluation_key.encode()).digest()
        return question.choices[drawn[0] % len(question.choices)]


class Numbers:
    """An adapter and its optimizer: weights and a moment, in fp32."""

    def __init__(self, spec: RunSpec, steps: int, state: dict[str, torch.Tensor] | None):
        self._seed = spec.trajectory_key
        if state is None:
            assert steps == 0
            state = {"weights": torch.linspace(-1, 1, NUMBERS), "moment": torch.zeros(NUMBERS), "steps": torch.tensor([0])}
        assert int(state["steps"]) == steps, "a state of another step"
        self._weights, self._moment, self._steps = state["weights"].clone(), state["moment"].clone(), steps

    def step(self, step: int) -> float:
        assert step == self._steps + 1, "a step left out, or taken twice"
        drawn = hashlib.sha256(f"{self._seed} {step}".encode()).digest()[:NUMBERS]
        gradient = torch.tensor([byte / 255 for byte in drawn])
        self._moment = 0.9 * self._moment + gradient
        self._weights = self._weights - 0.1 * self._moment - 0.01 * self._weights
        self._steps = step
        return float(self._weights.abs().sum())

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        return {"base_model.model.q_proj.lora_A.default.weight": self._weights.clone()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"weights": self._weights.clone(), "moment": self._moment.clone(), "steps": torch.tensor([self._steps])}


class _Answerer(Evaluator):
    """The evaluator without a model."""

    def __init__(self, base: BaseSpec, sources: Path, answer: Callable[..., str], opened: set[Path]):
        self.device = torch.device("cpu")
        self._base_facts = {"model": base.model.name}
        self._sources = sources
        self._adapted = self._adapter_digest = None
        self._numbers = torch.zeros(NUMBERS)
        self._answer = answer
        self._opened = opened

    def _task(self, evaluation: EvaluationSpec) -> _Task:
        return _task_of(evaluation.model_dump_json(), self._sources)

    def _load_adapter(self, folder: Path, prompt: list[int]) -> None:
        verify(folder)
        self._opened.add(folder)
        self._numbers = next(iter(load_file(folder / ADAPTER_WEIGHTS).values()))
        self._adapter_digest = adapter_digest(folder)

    def _unload_adapter(self) -> None:
        self._numbers, self._adapter_digest = torch.zeros(NUMBERS), None

    def _answers(self, task: _Task, evaluation: EvaluationSpec, journal: Journal, on_batch: object) -> tuple[Answers, int]:
        def answer(rows: list[int]) -> list[Any]:
            return [self._answer(self._numbers, self._adapter_digest, evaluation, task.questions[row]) for row in rows]

        answer_in_batches(task.prompts.token_ids, answer, journal, evaluation.batch_size)
        return Answers([journal.answers[row] for row in range(len(task.questions))], []), len(task.questions)


@lru_cache(maxsize=16)
def _task_of(evaluation: str, sources: Path) -> _Task:
    spec = EvaluationSpec.model_validate_json(evaluation)
    questions, _ = asked_rows(spec, load_benchmark(spec.benchmark, sources))
    return _Task(questions, EncodedPrompts([[1]] * len(questions), 0), [])
