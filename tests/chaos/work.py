"""What the simulated processes work on: training and decoding that cost nothing, and nothing else that is made up.

The loops around them are the program's own: `train_trial` with its leases, records, checkpoints and states, and the evaluator
with its journal and results. Only the model is missing: an adapter is a handful of numbers that follow from the run's
trajectory, step by step, so that one which goes on from a wrong state ends as another adapter. A pack takes its steps at once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from jmedlora.data.benchmarks import load_benchmark
from jmedlora.evaluation.batching import Asked, answer_in_batches
from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.results import Answers, Checkpoint, asked_rows
from jmedlora.evaluation.tasks import Task
from jmedlora.plan.checksums import adapter_digest, verify
from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec
from jmedlora.training.pack import Stepped, Wishes
from jmedlora.training.process import Worker
from jmedlora.training.rows import BaseModel
from jmedlora.training.trajectory import Trajectory
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
        """Optimizer steps taken, by the longest run of each trajectory."""
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

    @staticmethod
    def target_modules(*_: object) -> list[str]:
        return ["q_proj", "v_proj"]

    class TrainingSet:
        truncated = 0

        def __init__(self, spec: RunSpec, base: BaseModel, sources: Path): ...

    @contextmanager
    def training_pack(self, trajectories: Sequence[Trajectory], base: BaseModel, worker: Worker) -> Iterator[NumbersPack]:
        yield NumbersPack(self, trajectories)

    # -- evaluation

    def make_evaluator(self, base: BaseSpec, sources: Path, offline: bool, *_: object) -> Evaluator:
        self.world.sleep(BATCH_S)
        return _Answerer(base, sources, self._answer, self.opened)

    def _answer(self, numbers: torch.Tensor, digest: str, evaluation: EvaluationSpec, question: Any) -> str:
        self.answered[(digest, evaluation.evaluation_key)] += 1
        drawn = hashlib.sha256(numbers.numpy().tobytes() + question.problem_id.encode() + evaluation.evaluation_key.encode()).digest()
        return question.choices[drawn[0] % len(question.choices)]


class NumbersPack:
    """Trajectories in training together."""

    def __init__(self, work: Work, trajectories: Sequence[Trajectory]):
        self._work, self._trajectories = work, trajectories
        self._numbers = [Numbers(each.lead, each.step, each.state) for each in trajectories]
        for each in trajectories:
            each.state = None

    def step(self, wishes: Wishes) -> tuple[list[Stepped], Wishes]:
        self._work.world.sleep(self._work.step_s)
        return [self._step(each, own) for each, own in zip(self._trajectories, self._numbers, strict=True)], wishes

    def _step(self, trajectory: Trajectory, numbers: Numbers) -> Stepped:
        step, spec = trajectory.step + 1, trajectory.lead
        self._work.steps[spec.run_key] += 1
        told = {"step": step, "epoch": step / spec.steps_per_epoch, "loss": numbers.step(step), "grad_norm": 1.0, "tokens": 100}
        rate, seconds = spec.settings.learning_rate, self._work.step_s
        return Stepped(told | {"learning_rate": rate, "seconds": seconds, "time": self._work.world.time()})

    def adapter_tensors(self, place: int) -> dict[str, torch.Tensor]:
        return self._numbers[place].adapter_tensors()

    def state_tensors(self, place: int) -> dict[str, torch.Tensor]:
        return self._numbers[place].state_tensors()


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
        return {"base_model.model.q_proj.lora_A.weight": self._weights.clone()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"weights": self._weights.clone(), "moment": self._moment.clone(), "steps": torch.tensor([self._steps])}


class _Answerer(Evaluator):
    """The evaluator without a model."""

    def __init__(self, base: BaseSpec, sources: Path, answer: Callable[..., str], opened: set[Path]):
        self.device = torch.device("cpu")
        self._base_facts = {"model": base.model.name}
        self._sources = sources
        self._numbers: list[torch.Tensor] = []
        self._digests: list[str] = []
        self._answer = answer
        self._opened = opened

    def _task(self, evaluation: EvaluationSpec) -> Task:
        return _task_of(evaluation.model_dump_json(), self._sources)

    def _load(self, together: Sequence[Checkpoint], task: Task, storage: Storage) -> dict[Checkpoint, str | Exception | None]:
        if not together[0].step:
            self._numbers, self._digests = [torch.zeros(NUMBERS)], [""]
            return {together[0]: None}
        self._numbers, self._digests = [], []
        loaded: dict[Checkpoint, str | Exception | None] = {}
        for checkpoint in together:
            folder = storage.run(checkpoint.run_key).checkpoint(checkpoint.step)
            try:
                verify(folder)
                self._opened.add(folder)
                numbers = next(iter(load_file(folder / ADAPTER_WEIGHTS).values()))
                loaded[checkpoint] = digest = adapter_digest(folder)
            except Exception as error:
                loaded[checkpoint] = error
            else:
                self._numbers.append(numbers)
                self._digests.append(digest)
        return loaded

    def _answers(self, task: Task, evaluation: EvaluationSpec, journals: Sequence[Journal], on_batch: object) -> list[tuple[Answers, int]]:
        def answer(asked: list[Asked]) -> list[Any]:
            return [
                self._answer(self._numbers[each.adapter], self._digests[each.adapter], evaluation, task.questions[each.prompt])
                for each in asked
            ]

        answer_in_batches(task.prompts.token_ids, answer, journals, evaluation.batch_size)
        count = len(task.questions)
        return [(Answers([own.answers[prompt] for prompt in range(count)], []), count) for own in journals]


@lru_cache(maxsize=16)
def _task_of(evaluation: str, sources: Path) -> Task:
    spec = EvaluationSpec.model_validate_json(evaluation)
    questions, _ = asked_rows(spec, load_benchmark(spec.benchmark, sources))
    return Task(questions, EncodedPrompts([[1]] * len(questions), 0), [])
