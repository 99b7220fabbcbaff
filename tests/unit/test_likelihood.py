from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from jmedlora.config.benchmark import MetricSettings
from jmedlora.data.rows import Question
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.likelihood import weigh_choices
from jmedlora.evaluation.resident import Resident
from jmedlora.evaluation.results import Likelihoods, score_likelihoods
from jmedlora.models.random_models import build_model
from tests.tiny import tiny_model

PROMPTS = [[256, 7, 9, *range(20, 20 + length)] for length in (1, 14, 3, 3, 30, 1)]
CHOICES = [
    [[5], [6, 7, 8], [9, 9]],
    [[41, 42], [43], [44, 45, 46, 47]],
    [[5, 6], [5, 7]],
    [[5, 6], [5, 7]],
    [[1], [2], [3], [4], [5]],
    [[60, 61, 62, 63, 64, 65], [6]],
]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    shape = tiny_model(request.param).architecture
    assert shape is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = build_model(request.param, shape)
    for weight in built.parameters():
        if weight.dim() == 2:
            weight.data *= 8
    return built.eval().requires_grad_(False)


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, prompt: list[int], choice: list[int]) -> float:
    """The plain way: one text, one forward pass, no cache."""
    likely = torch.log_softmax(model(input_ids=torch.tensor([prompt + choice])).logits[0].double(), -1)
    return math.fsum(float(likely[len(prompt) - 1 + place, token]) for place, token in enumerate(choice))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_weigh_choices_as_one_by_one_does(model: PreTrainedModel, batch_size: int) -> None:
    done: list[int] = []
    prompts, so_far = EncodedPrompts(PROMPTS, 0), AnswersSoFar(batch_size)
    [weighed] = weigh_choices(Resident(model, "cpu"), prompts, CHOICES, batch_size, [so_far], done.append)
    assert done[-1] == len(PROMPTS) and done == sorted(done)
    for prompt, choices, each in zip(PROMPTS, CHOICES, weighed, strict=True):
        assert each.tokens == tuple(map(len, choices))
        assert each.sums == pytest.approx([one_by_one(model, prompt, choice) for choice in choices], abs=1e-4)


def test_prompts_without_anything_in_common(model: PreTrainedModel) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    choices = [[[7, 8], [9]], [[7, 8], [9]]]
    [weighed] = weigh_choices(Resident(model, "cpu"), EncodedPrompts(prompts, 0), choices, 10, [AnswersSoFar(10)])
    for prompt, each in zip(prompts, weighed, strict=True):
        assert each.sums == pytest.approx([one_by_one(model, prompt, [7, 8]), one_by_one(model, prompt, [9])], abs=1e-4)


def asked(*gold: int, choices: tuple[str, ...] = ("脚気", "夜盲症になる", "a")) -> Question:
    return Question("1", "どれか。", choices, gold or (0,))


def test_the_likeliest_choices_are_taken_as_many_as_are_right() -> None:
    likelihoods = Likelihoods((-1.0, -4.0, -2.0), (1, 8, 1))
    score = score_likelihoods(likelihoods, asked(0), MetricSettings())
    assert score.chosen == (0,) and score.correct and score.exact_match and score.gestalt_score == 1
    both = score_likelihoods(likelihoods, asked(0, 1), MetricSettings())
    assert both.chosen == (0, 2) and not both.correct and both.response == "脚気,a"
    assert 0 < both.gestalt_score < 1
    assert score_likelihoods(likelihoods, asked(0, 1), MetricSettings(multiple="top_1")).correct


@pytest.mark.parametrize(("way", "chosen"), [("sum", 0), ("per_token", 1), ("per_character", 0), ("per_byte", 1)])
def test_normalisations(way: str, chosen: int) -> None:
    # the second choice: -4 over 8 tokens is more than -1 over one, -4 over 6 characters less than -1 over 2
    likelihoods = Likelihoods((-1.0, -4.0, -9.0), (1, 8, 1))
    if way == "per_byte":
        # over 18 bytes a little more than the first over 6
        likelihoods = Likelihoods((-1.0, -2.9, -9.0), (1, 8, 1))
    assert score_likelihoods(likelihoods, asked(0), MetricSettings.model_validate({"loglikelihood": way})).chosen == (chosen,)


def test_an_answer_that_accepts_either_of_two() -> None:
    question = Question("1", "どれか。", ("甲", "乙", "丙"), (0,), alternatives=((2,),))
    assert score_likelihoods(Likelihoods((-3.0, -2.0, -1.0), (1, 1, 1)), question, MetricSettings()).correct
    assert not score_likelihoods(Likelihoods((-3.0, -1.0, -2.0), (1, 1, 1)), question, MetricSettings()).correct


def test_ties() -> None:
    tie = Likelihoods((-1.0, -1.0, -2.0), (1, 1, 1))
    assert score_likelihoods(tie, asked(0), MetricSettings()).chosen == (0,)
    assert score_likelihoods(tie, asked(0), MetricSettings(ties="last")).chosen == (1,)
    wrong = score_likelihoods(tie, asked(0), MetricSettings(ties="wrong"))
    assert not wrong.correct
    assert score_likelihoods(Likelihoods((-1.0, -3.0, -3.0), (1, 1, 1)), asked(0), MetricSettings(ties="wrong")).correct
