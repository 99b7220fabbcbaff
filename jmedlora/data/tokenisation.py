"""Texts as token ids: prompts, answers, and whole training sets, kept memory-mapped on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.atomic import appearing
from jmedlora.data.prompts import render_messages, render_prompt, target_of
from jmedlora.data.rows import Instruction

if TYPE_CHECKING:
    import datasets  # where it is used alone: evaluation does without

_BLOCK_ROWS = 1000


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, row: Instruction, examples: Sequence[Instruction] = ()) -> str:
    """The text put before the model: the rendered template, or for a chat prompt the messages in the tokenizer's chat template.

    Raises BadInput for a chat prompt where the tokenizer has no chat template, or one that does not take these messages.
    """
    if not prompt.chat:
        return render_prompt(prompt, row, examples)
    if not tokenizer.chat_template:
        raise BadInput([Fault(f"prompt {prompt.name}", "chat", "the model has no chat template", "a prompt without chat, or a chat model")])
    try:
        text = tokenizer.apply_chat_template(render_messages(prompt, row, examples), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the model's program
        raise BadInput([Fault(f"prompt {prompt.name}", "chat", f"the model's chat template refuses it: {error}")]) from None
    assert isinstance(text, str)
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, max_input_tokens: int | None, is_chat: bool = False) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts before a text (BOS) but nothing after it.

    Of a chat prompt, whose template writes its own special tokens, nothing is added. A prompt longer than `max_input_tokens`
    keeps BOS and its last tokens, so that the mark before the answer survives.
    """
    return _cut_prompt(_opening(tokenizer, is_chat), tokenizer(text, add_special_tokens=False).input_ids, max_input_tokens)


def encode_choice(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a choice that follows a prompt directly, without an end-of-text token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def tokenise_rows(
    rows: Sequence[Instruction],
    prompt: PromptConfig,
    tokenizer: PreTrainedTokenizerBase,
    identity: str,
    max_input_tokens: int,
    max_target_tokens: int,
    cache: Path,
) -> datasets.Dataset:
    """The training set as columns `input_ids` (prompt and answer), `prompt_length` (tokens) and `truncated`, in row order.

    Built by one process per `identity` (a digest of everything that the result depends on) below `cache`, and opened memory-mapped.
    """
    import datasets

    folder = cache / "tokens" / identity
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _write(_tokenised(rows, prompt, tokenizer, max_input_tokens, max_target_tokens), folder)
    return datasets.load_from_disk(str(folder), keep_in_memory=False)


def _tokenised(
    rows: Sequence[Instruction], prompt: PromptConfig, tokenizer: PreTrainedTokenizerBase, max_input_tokens: int, max_target_tokens: int
) -> datasets.Dataset:
    import datasets

    of_tokens, whole, flag = (datasets.Value(kind) for kind in ("int32", "int32", "bool"))
    kinds = datasets.Features({"input_ids": datasets.List(of_tokens), "prompt_length": whole, "truncated": flag})
    opening, end = _opening(tokenizer, prompt.chat), _end_of_text(tokenizer)
    blocks = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        questions = tokenizer([prompt_text(tokenizer, prompt, row) for row in block], add_special_tokens=False).input_ids
        answers = tokenizer([target_of(prompt, row) for row in block], add_special_tokens=False).input_ids
        columns: dict[str, list] = {"input_ids": [], "prompt_length": [], "truncated": []}
        for question, answer in zip(questions, answers, strict=True):
            asked = _cut_prompt(opening, question, max_input_tokens)
            columns["input_ids"].append([*asked, *answer[: max_target_tokens - 1], end])
            columns["prompt_length"].append(len(asked))
            columns["truncated"].append(len(opening) + len(question) > max_input_tokens or len(answer) + 1 > max_target_tokens)
        blocks.append(datasets.Dataset.from_dict(columns, features=kinds))
    return datasets.concatenate_datasets(blocks)


def _write(dataset: datasets.Dataset, folder: Path) -> None:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with appearing(folder) as aside:
            dataset.save_to_disk(str(aside))
    finally:
        if shown:
            datasets.enable_progress_bars()


def _opening(tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> list[int]:
    """The special tokens that the tokenizer puts before any text that is no chat."""
    if is_chat:
        return []
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise ValueError(f"{type(tokenizer).__name__} encodes a text differently when it adds special tokens")


def _cut_prompt(opening: list[int], ids: list[int], max_input_tokens: int | None) -> list[int]:
    room = None if max_input_tokens is None else max_input_tokens - len(opening)
    return [*opening, *(ids if room is None or len(ids) <= room else ids[len(ids) - room :])]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token")
    return int(tokenizer.eos_token_id)
