"""Checks of the bundled sample data: format, spread, and no leak between files."""

import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

LETTERS = "abcde"
FILES = ("instructions.jsonl", "questions.jsonl", "fewshot.jsonl", "README.md")


def _sample_dir():
    try:
        from importlib.resources import files

        folder = files("jmedlora") / "data/sample"
        if (folder / FILES[0]).is_file():
            return folder
    except ModuleNotFoundError:
        pass
    return Path(__file__).resolve().parents[2] / "jmedlora" / "data" / "sample"


def _read(name):
    return (_sample_dir() / name).read_text(encoding="utf-8")


def _rows(name):
    text = _read(name)
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def _instructions():
    return _rows("instructions.jsonl")


def _five_choice_instructions():
    return [row for row in _instructions() if row["input"]]


def _correct(question):
    return question["choices"][LETTERS.index(question["answer"][0])]


def _normalise(text):
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))


def _sentences(text):
    parts = re.split(r"[。?？\n]", unicodedata.normalize("NFKC", text))
    return [part for part in map(_normalise, parts) if part]


def _training_texts(row):
    """The texts of a training row: question, each choice, answer."""
    return [row["instruction"], *row["input"].split(","), row["output"]]


def _question_texts(question):
    return [question["problem_text"], *question["choices"]]


def _longest_streak(values):
    longest = run = 1
    for left, right in itertools.pairwise(values):
        run = run + 1 if left == right else 1
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("name", FILES)
def test_file_is_there(name):
    assert (_sample_dir() / name).is_file()


def test_instruction_counts_and_keys():
    rows = _instructions()
    assert 48 <= len(rows) <= 56
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert all(row["instruction"] and row["output"] for row in rows)
    assert len({_normalise(row["instruction"]) for row in rows}) == len(rows)
    assert len(_five_choice_instructions()) >= 42
    assert 6 <= len(rows) - len(_five_choice_instructions()) <= 8


def test_instructions_are_short_single_lines():
    for row in _instructions():
        assert all("\n" not in value and value == value.strip() for value in row.values())
        assert sum(map(len, row.values())) <= 60


def test_five_choice_outputs_are_among_the_choices():
    for row in _five_choice_instructions():
        choices = row["input"].split(",")
        assert len(choices) == 5
        assert len(set(map(_normalise, choices))) == 5
        assert all(choice and choice == choice.strip() for choice in choices)
        assert choices.count(row["output"]) == 1


@pytest.mark.parametrize(("name", "prefix", "count"), [("questions.jsonl", "S1A", 40), ("fewshot.jsonl", "S0A", 3)])
def test_igakuqa_format(name, prefix, count):
    rows = _rows(name)
    assert [row["problem_id"] for row in rows] == [f"{prefix}{i + 1}" for i in range(count)]
    for row in rows:
        assert set(row) == {
            "problem_id",
            "problem_text",
            "choices",
            "text_only",
            "answer",
            "points",
        }
        assert isinstance(row["problem_text"], str) and row["problem_text"].strip()
        assert len(row["choices"]) == 5
        assert len(set(map(_normalise, row["choices"]))) == 5
        assert all(isinstance(choice, str) and choice for choice in row["choices"])
        assert all("," not in choice and "\n" not in choice for choice in row["choices"])
        assert row["text_only"] is True
        assert len(row["answer"]) == 1 and row["answer"][0] in set(LETTERS)
        assert row["points"] == "1"
    assert len({_normalise(row["problem_text"]) for row in rows}) == count


def test_text_is_stored_unescaped():
    for name in FILES[:3]:
        assert "\\u" not in _read(name)


def test_question_answers_are_spread():
    letters = [row["answer"][0] for row in _rows("questions.jsonl")]
    counts = Counter(letters)
    assert set(counts) == set(LETTERS)
    assert all(6 <= count <= 10 for count in counts.values())
    assert _longest_streak(letters) <= 2


def test_instruction_answers_are_spread():
    positions = [row["input"].split(",").index(row["output"]) for row in _five_choice_instructions()]
    counts = Counter(positions)
    assert set(counts) == set(range(5))
    assert all(6 <= count <= 11 for count in counts.values())
    assert _longest_streak(positions) <= 4


def test_length_does_not_give_the_answer():
    asked = [(row["choices"], _correct(row)) for row in _rows("questions.jsonl")]
    training = [(row["input"].split(","), row["output"]) for row in _five_choice_instructions()]
    for items in (asked, training):
        for extreme in (max, min):
            alone = 0
            for choices, correct in items:
                lengths = [len(choice) for choice in choices]
                bound = extreme(lengths)
                alone += len(correct) == bound and lengths.count(bound) == 1
            assert alone <= 0.25 * len(items)


def test_no_sentence_of_one_file_occurs_in_the_other():
    training = [_normalise(text) for row in _instructions() for text in _training_texts(row)]
    training += [_normalise(row["input"]) for row in _instructions()]
    for question in _rows("questions.jsonl"):
        for text in _question_texts(question):
            for sentence in _sentences(text):
                if len(sentence) >= 10:
                    assert not any(sentence in other for other in training), sentence

    asked = [_normalise(text) for question in _rows("questions.jsonl") for text in _question_texts(question)]
    for row in _instructions():
        for text in _training_texts(row):
            for sentence in _sentences(text):
                if len(sentence) >= 10:
                    assert not any(sentence in other for other in asked), sentence


def _question_body(text):
    return "".join(_sentences(text))


def test_no_question_contains_another_files_question():
    training = [_question_body(row["instruction"]) for row in _instructions()]
    asked = [_question_body(row["problem_text"]) for row in _rows("questions.jsonl")]
    shown = [_question_body(row["problem_text"]) for row in _rows("fewshot.jsonl")]
    for left, right in ((training, asked), (training, shown), (asked, shown)):
        for one in left:
            for other in right:
                assert one not in other and other not in one, (one, other)


def test_answers_cannot_be_looked_up_in_the_training_outputs():
    outputs = {_normalise(row["output"]) for row in _instructions()}
    questions = _rows("questions.jsonl")
    answers = {_normalise(_correct(question)) for question in questions}
    assert not [text for text in answers & outputs if len(text) > 8]

    # Picking at random among the choices that are training outputs must not
    # do better than guessing.
    expected = 0.0
    for question in questions:
        known = [choice for choice in question["choices"] if _normalise(choice) in outputs]
        pool = known or question["choices"]
        expected += (_correct(question) in pool) / len(pool)
    assert expected / len(questions) <= 0.2


def test_fewshot_facts_occur_in_neither_of_the_others():
    other = [_normalise(text) for row in _instructions() for text in _training_texts(row)]
    other += [_normalise(text) for question in _rows("questions.jsonl") for text in _question_texts(question)]
    for row in _rows("fewshot.jsonl"):
        answer = _normalise(_correct(row))
        assert not any(answer in text for text in other), answer


@pytest.mark.parametrize("label", ["Synthetic", "Apache-2.0", "Not for clinical use"])
def test_readme_carries_the_labels(label):
    assert label.lower() in _read("README.md").lower()


def test_readme_names_every_data_file():
    readme = _read("README.md")
    for name in FILES[:3]:
        assert f"`{name}` | {len(_rows(name))} |" in readme
