from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from jmedlora.data.rows import Instruction
from jmedlora.data.tokenisation import encode_prompt, tokenise_rows
from jmedlora.models.random_models import byte_tokenizer
from tests.tiny import PROMPT

BOS, EOS = 257, 258


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_the_byte_tokenizer_reads_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "以下は、試験問題です。\r\n\t① a  b𠮟\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_prompt_opens_with_bos_and_has_no_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, "答え：", None)
    assert ids[0] == BOS
    assert EOS not in ids
    assert tokenizer.decode(ids[1:]) == "答え："


def test_a_tokenizer_that_closes_texts_does_not_close_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    closing = byte_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert closing("a").input_ids[-1] == EOS
    assert encode_prompt(closing, "答え：", None) == encode_prompt(tokenizer, "答え：", None)
    bare = byte_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode_prompt(bare, "答え：", None) == encode_prompt(tokenizer, "答え：", None)[1:]


def test_a_long_prompt_keeps_bos_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(tokenizer, "x" * 50 + "tail:", 9)
    assert ids[0] == BOS
    assert tokenizer.decode(ids[1:]) == "xxxtail:"
    assert len(encode_prompt(tokenizer, "x" * 8, 9)) == 9
    assert encode_prompt(tokenizer, "abc", 1) == [BOS]


def answer_of(tokenizer: PreTrainedTokenizerFast, text: str, most: int, cache: Path) -> list[int]:
    """The tokens of a row's answer, as training sees them."""
    row = tokenise_rows([Instruction("問い", "", text)], PROMPT, tokenizer, f"{text}-{most}", 64, most, cache)[0]
    return list(row["input_ids"][row["prompt_length"] :])


def test_an_answer_ends_with_eos_even_when_cut(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert answer_of(tokenizer, "abc", 4, tmp_path) == [*tokenizer("abc", add_special_tokens=False).input_ids, EOS]
    cut = answer_of(tokenizer, "abcdef", 4, tmp_path)
    assert len(cut) == 4
    assert cut[-1] == EOS
    assert tokenizer.decode(cut[:-1]) == "abc"
    assert answer_of(tokenizer, "abc", 1, tmp_path) == [EOS]


def test_rows_are_prompt_and_answer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [Instruction("問題", "1,2", "答" * 3), Instruction("問題", "1,2", "答" * 9), Instruction("長い" * 30, "", "答")] * 700
    dataset = tokenise_rows(rows, PROMPT, tokenizer, "abc", max_input_tokens=40, max_target_tokens=12, cache=tmp_path)
    assert dataset.column_names == ["input_ids", "prompt_length", "truncated"]
    assert len(dataset) == 2100
    for place in (0, 1, 2, 1501, 2099):
        row, ids, start = rows[place], dataset[place]["input_ids"], dataset[place]["prompt_length"]
        assert ids[:start] == encode_prompt(tokenizer, f"{row.instruction}\n{row.input}\n答え：", 40)
        assert ids[start:] == [*tokenizer(row.output, add_special_tokens=False).input_ids[:11], EOS]
    assert dataset["truncated"][:3] == [False, True, True]


def test_rows_are_tokenised_once_per_identity(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = tokenise_rows([Instruction("a", "b", "c")], PROMPT, tokenizer, "one", 64, 64, tmp_path)
    again = tokenise_rows([Instruction("other", "b", "c")], PROMPT, tokenizer, "one", 64, 64, tmp_path)
    other = tokenise_rows([Instruction("other", "b", "c")], PROMPT, tokenizer, "two", 64, 64, tmp_path)
    assert again[:] == first[:]
    assert other[:] != first[:]
    assert again.cache_files, "memory-mapped"
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["one", "one.lock", "two", "two.lock"]
