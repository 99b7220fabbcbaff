from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config.faults import BadInput
from jmedlora.config.parts import Family
from jmedlora.evaluation import prefix
from jmedlora.evaluation.batching import Asked, answer_in_batches
from jmedlora.evaluation.generation import Generation, decode_greedily, encode_prompts, max_prompt_tokens
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.metrics import first_line_is_complete
from jmedlora.evaluation.resident import Resident
from jmedlora.models.random_models import build_model, byte_tokenizer
from tests.tiny import tiny_model

NEW_TOKENS = 12
END = 258
FAMILIES: tuple[Family, ...] = ("llama", "gpt_neox")
SHARED = "次の問題に答えよ。\n"
QUESTIONS = ("脚気", "夜盲症はどれか。", "a", "ビタミンB1の欠乏症はどれか。\n壊血病,痛風\n", "痛風の原因は", "b", "脚気")
PROMPTS = [SHARED + question for question in QUESTIONS]


@cache
def models() -> dict[Family, PreTrainedModel]:
    """Random models whose next token depends on all tokens before, by margins far above rounding."""
    made: dict[Family, PreTrainedModel] = {}
    for family in FAMILIES:
        shape = tiny_model(family).architecture
        assert shape is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(39)
            model = build_model(family, shape.model_copy(update={"tied_embeddings": False}))
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.data *= 12 if "embed" not in name else 40
        made[family] = model.eval().requires_grad_(False)
    return made


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    chosen = models()[request.param]
    kept = chosen.generation_config
    yield chosen
    chosen.generation_config = kept


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def generate_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int, batch_size: int, device: str
) -> Generation:
    encoded = encode_prompts(tokenizer, prompts, max_prompt_tokens(model, max_new_tokens))
    return decode_greedily(model, tokenizer, encoded, max_new_tokens, batch_size, device)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int) -> Generation:
    return generate_responses(model, tokenizer, prompts, NEW_TOKENS, batch_size, "cpu")


@torch.inference_mode()
def plain_greedy(model: PreTrainedModel, token_ids: list[int], count: int) -> tuple[list[int], float]:
    """Tokens by whole forward passes, without cache, padding or batch, and the smallest lead of a chosen token over the next."""
    ids, lead = list(token_ids), float("inf")
    for _ in range(count):
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        lead = min(lead, float(best.values[0] - best.values[1]))
    return ids[len(token_ids) :], lead


def until_finished(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """The text of the shortest part of an answer at which it counts as finished, or of all of it."""
    for length in range(1, len(answer) + 1):
        text = tokenizer.decode(answer[:length], skip_special_tokens=True)
        if answer[length - 1] == END or first_line_is_complete(text):
            return text
    return tokenizer.decode(answer, skip_special_tokens=True)


class Scripted(torch.nn.Module):
    """A model that says the bytes of a given text after each prompt, whatever the batch."""

    def __init__(self, model: PreTrainedModel, script: dict[int, list[int]]):
        super().__init__()
        self.inner, self.script, self.rows_seen = model, script, []
        self.config, self.generation_config, self.base_model = model.config, model.generation_config, model.base_model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, **rest: object) -> object:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)
        self.rows_seen.append(len(input_ids))
        # The prompts differ in length, so the position says which prompt a row belongs to, and how far its answer is.
        for row, position in enumerate(position_ids[:, -1].tolist()):
            start = max(length for length in self.script if length <= position + 1)
            output.logits[row, -1] = 0
            output.logits[row, -1, self.script[start][position + 1 - start]] = 1
        return output


def scripted(tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: bool = False) -> tuple[Scripted, list[str]]:
    """A model that answers the i-th of the returned prompts with the i-th text (then `</s>`, or a filling)."""
    prompts = ["x" * (100 + 20 * i) for i in range(len(texts))]  # alike enough to share a batch
    script = {}
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids + ([END] if ends else [])
        script[len(tokenizer(prompt).input_ids)] = ids + [ord("z") - 33] * 20
    return Scripted(models()["llama"], script), prompts


def test_the_models_tell_prompts_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = answers(model, tokenizer, PROMPTS, 3).texts
    assert texts[0] == texts[-1]
    assert len(set(texts)) >= len(PROMPTS) - 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, len(PROMPTS)])
def test_answers_do_not_depend_on_the_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    encoded = encode_prompts(tokenizer, PROMPTS, 200)
    assert len(set(map(len, encoded.token_ids))) > 3
    batched = decode_greedily(model, tokenizer, encoded, NEW_TOKENS, batch_size, "cpu")
    for prompt, ids, text in zip(PROMPTS, encoded.token_ids, batched.texts, strict=True):
        expected, lead = plain_greedy(model, ids, NEW_TOKENS)
        assert lead > 1e-3, "near ties: the comparison would test rounding"
        assert text == until_finished(tokenizer, expected)
        assert answers(model, tokenizer, [prompt], 1).texts == [text]


def test_answers_are_those_of_transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = model.generate(**batch, generation_config=GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=256))
    for ids, text in zip(made[:, batch.input_ids.shape[1] :].tolist(), answers(model, tokenizer, PROMPTS, 4).texts, strict=True):
        assert text == until_finished(tokenizer, ids)


def test_sampling_and_penalties_of_the_model_play_no_part(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    plain = answers(model, tokenizer, PROMPTS, 3)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.3, repetition_penalty=1.7, no_repeat_ngram_size=1, num_beams=2, eos_token_id=END
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers(model, tokenizer, PROMPTS, 3) == plain
    assert not caplog.records


def test_a_row_ends_once_a_line_break_follows_text(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["脚気\n壊血病", "\n 痛風\n\n喘息", "夜盲症。\r\n続き", "壊血病です"]
    model, prompts = scripted(tokenizer, texts)
    made = generate_responses(model, tokenizer, prompts, 16, 4, "cpu")
    assert made.texts == ["脚気\n", "\n 痛風\n", "夜盲症。\r", "壊血病ですz"]
    assert made.new_tokens == len("".join(made.texts).encode())


def test_a_row_ends_at_the_end_token_which_is_not_part_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    model, prompts = scripted(tokenizer, ["脚気", "", "痛風です"], ends=True)
    made = generate_responses(model, tokenizer, prompts, 30, 3, "cpu")
    assert made.texts == ["脚気", "", "痛風です"]
    assert made.new_tokens == len("脚気痛風です".encode()) + 3


def test_every_end_token_that_the_model_names_ends_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    model, prompts = scripted(tokenizer, ["脚気z"])
    model.generation_config = GenerationConfig(eos_token_id=[END, tokenizer.convert_tokens_to_ids("z")])
    assert generate_responses(model, tokenizer, prompts, 20, 1, "cpu").new_tokens == 7


def test_finished_rows_leave_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a", "b", "脚気", "夜盲症夜盲症"]
    model, prompts = scripted(tokenizer, texts, ends=True)
    made = generate_responses(model, tokenizer, prompts, 30, 4, "cpu")
    assert made.texts == texts
    assert model.rows_seen[0] == 4
    assert model.rows_seen[-1] == 1
    assert len(model.rows_seen) == len("夜盲症夜盲症".encode()) + 1


def test_a_prompt_that_is_too_long_keeps_its_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    room = max_prompt_tokens(model, NEW_TOKENS)
    assert room == model.config.max_position_embeddings - NEW_TOKENS
    longest = "c" * (room - 1)
    made = answers(model, tokenizer, ["始まり" + longest, longest, "脚気"], 3)
    assert made.truncated_prompts == 1
    assert made.texts[0] == made.texts[1]
    assert made.prompt_tokens == 2 * room + 7
    with pytest.raises(BadInput, match="no room for a prompt"):
        max_prompt_tokens(model, model.config.max_position_embeddings)


def test_progress_is_told_after_each_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    done: list[int] = []
    decode_greedily(models()["llama"], tokenizer, encode_prompts(tokenizer, PROMPTS, 200), 2, 3, "cpu", done.append)
    assert done == [3, 6, 7]


def test_no_prompts_give_no_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answers(model, tokenizer, [], 4) == Generation([], 0, 0, 0)


def test_a_batch_holds_prompts_of_similar_length(tokenizer: PreTrainedTokenizerBase) -> None:
    model, _ = scripted(tokenizer, ["a"])
    model.script = {1: [END] * 300}
    prompts = ["x" * length for length in (20, 25, 30, 100, 110, 120, 125, 200)]
    made = generate_responses(model, tokenizer, prompts, 1, 3, "cpu")
    assert len(made.texts) == len(prompts)
    assert model.rows_seen == [3, 3, 1, 1]


def test_what_is_answered_leaves_its_batch_and_moves_nothing_else() -> None:
    prompts, asked, told = [[7] * length for length in (5, 1, 3, 2, 4, 6, 8, 7)], [], []
    so_far = AnswersSoFar(3)
    so_far.add({1: "a", 3: "b", 4: "c"})

    def answer(batch: list[Asked]) -> list[str]:
        asked.append([each.prompt for each in batch])
        return [f"{each.prompt}" for each in batch]

    answer_in_batches(prompts, answer, [so_far], 3, on_batch=told.append)
    assert asked == [[2], [0, 5], [7, 6]], "batches are (1, 3, 2), (4, 0, 5), (7, 6)"
    assert told == [3, 4, 6, 8]
    assert so_far.answers == {0: "0", 1: "a", 2: "2", 3: "b", 4: "c", 5: "5", 6: "6", 7: "7"}


@pytest.mark.parametrize(
    ("width", "batch_size", "left", "sizes"),
    [
        (1, 5, 2, [5, 2, 2, 1, 2, 2, 1, 1]),
        (1, 11, 2, [11, 5, 2, 2, 2, 2, 2, 1]),
        (4, 23, 8, [5, 2, 2, 1, 2, 2, 1, 1]),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(width: int, batch_size: int, left: int, sizes: list[int]) -> None:
    tried: list[int] = []

    def answer(batch: list[Asked]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [each.prompt for each in batch]

    so_far = AnswersSoFar(batch_size)
    answer_in_batches([[7]] * 11, answer, [so_far], batch_size, width)
    assert tried == sizes
    assert so_far.batch_size == left
    assert so_far.answers == {row: row for row in range(11)}


def test_a_single_prompt_that_does_not_fit_is_an_error() -> None:
    def answer(batch: list[Asked]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        answer_in_batches([[7]] * 4, answer, [AnswersSoFar(4)], 4)


def test_several_adapters_are_asked_the_same_prompts_at_once_less_what_is_answered() -> None:
    prompts, asked, told = [[7] * length for length in (3, 1, 2)], [], []
    so_far = [AnswersSoFar(2), AnswersSoFar(2)]
    so_far[1].add({2: "known"})

    def answer(batch: list[Asked]) -> list[str]:
        asked.append(batch)
        return [f"{each.adapter} {each.prompt}" for each in batch]

    answer_in_batches(prompts, answer, so_far, 2, on_batch=told.append)
    assert asked == [[(0, 1), (0, 2), (1, 1)], [(0, 0), (1, 0)]]
    assert told == [1, 4, 6]
    assert so_far[0].answers == {0: "0 0", 1: "0 1", 2: "0 2"}
    assert so_far[1].answers == {0: "1 0", 1: "1 1", 2: "known"}


def test_a_pack_that_does_not_fit_is_halved_down_to_one_prompt_of_one_adapter() -> None:
    tried: list[int] = []

    def answer(batch: list[Asked]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [each.adapter for each in batch]

    so_far = [AnswersSoFar(2), AnswersSoFar(2), AnswersSoFar(2)]
    answer_in_batches([[7]] * 2, answer, so_far, 2)
    assert tried == [6, 3, *[1] * 6]
    assert [own.batch_size for own in so_far] == [1, 1, 1]
    assert [own.answers for own in so_far] == [{0: adapter, 1: adapter} for adapter in range(3)]


def test_prompts_read_in_parts_are_answered_alike(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answers(model, tokenizer, PROMPTS, len(PROMPTS))
    monkeypatch.setattr(prefix, "TOKENS_READ_AT_ONCE", {"cpu": 20})
    assert answers(model, tokenizer, PROMPTS, len(PROMPTS)) == whole


def test_a_prefix_that_does_not_fit_for_all_adapters_is_read_in_halves(model: PreTrainedModel) -> None:
    rows_seen: list[int] = []

    def refuse(_: torch.nn.Module, arguments: tuple[object, ...], keywords: dict[str, torch.Tensor]) -> None:
        rows_seen.append(len(keywords["input_ids"]))
        if rows_seen[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    resident = Resident(model, "cpu")
    with torch.inference_mode():
        expected = prefix._read(resident, [1, 2, 3], [0, 0, 0, 0, 0])
        hook = model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        halved = prefix._read(resident, [1, 2, 3], [0, 0, 0, 0, 0])
        hook.remove()
    assert rows_seen == [5, 2, 3, 1, 2]
    for layer, other in zip(expected.layers, halved.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)
