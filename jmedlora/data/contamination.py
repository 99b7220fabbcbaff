"""Benchmark questions among training rows: a score on a question that was trained on measures memory.

Texts are compared by their letters, digits, kana and kanji alone. Rare character n-grams name the pairs worth a look
(phrases that many questions share, such as 「正しいのはどれか」, name none), then the best place for the question in the
row is found and the rules of `_least_similarity` decide. Questions of fewer than `ngram` characters are not looked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rapidfuzz import fuzz

from jmedlora.data.ngrams import NgramIndex, build_index, find_candidates
from jmedlora.data.rows import Instruction, Question

Kind = Literal["question", "question and answer"]

CHUNK_CHARACTERS = 400_000
"""Characters of rows that are looked at together: keeps memory flat whatever the number of rows."""
OVERLAP_CHARACTERS = 60
_LEFT_OUT = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class LeakSettings:
    """When a row counts as holding a question; similarities from 0 to 100, lengths in normalised characters."""

    ngram: int = 6
    """Two or three words: a changed word in a short question must leave some whole."""
    ngram_en: int = 16
    ngram_choices: int = 4
    least_share: float = 0.15
    """Share of a text's rare n-grams that a row must hold to be looked at."""
    least_share_short: float = 0.5
    """The same for a short text without all of its choices: its subject must be there, not only what it asks."""
    least_share_choices: float = 0.6
    """The same of the choices beside a short text, in which a changed word may have left nothing rare."""
    boilerplate: float = 0.01
    """An n-gram in more than this share of the questions (and in more than three) is a phrase of the exam."""
    similarity: float = 90.0
    similarity_beside_choices: float = 65.0
    """Enough where every choice stands in the row as well."""
    long: int = 40
    """A text from this length on is a leak by itself."""
    long_en: int = 100

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


DEFAULT_LEAK_SETTINGS = LeakSettings()


@dataclass(frozen=True)
class Leak:
    """A question found in a training row."""

    row: int
    """Position in the training set, from 0."""
    where: str
    """`file:line` of the row, where it is known."""
    benchmark: str
    problem_id: str
    kind: Kind
    """`question and answer`: the texts of all right choices stand in the row as well."""
    language: Literal["ja", "en"]
    """Language of the question's text that was found; `en` is the benchmark's translation."""
    similarity: float
    """Of the question's text and its place in the row: 100 for a copy."""
    share: float
    """Share of the rare n-grams of the text, or else of the choices, that the row holds, from 0 to 1."""
    overlap: str
    """The place in the row, normalised, its middle left out where it is long."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Needle:
    """A question in one language, normalised."""

    question: int
    """Position among the questions."""
    language: Literal["ja", "en"]
    text: str
    choices: tuple[str, ...]
    gold: tuple[str, ...]
    """Texts of the right choices, or the value of a question without choices."""
    long: bool
    common: bool = False
    """The text holds nothing but the exam's phrases."""


@dataclass(frozen=True)
class _Lookup:
    """Needles, the index of their texts or of their choices, and the share of n-grams that must be found."""

    needles: list[_Needle]
    index: NgramIndex
    least_share: float
    of_text: bool


def normalise(text: str) -> str:
    """NFKC, lower case, and of that only letters, digits, kana and kanji."""
    return _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text).lower())


def find_leaks(
    rows: Sequence[Instruction], questions: Sequence[Question], settings: LeakSettings = DEFAULT_LEAK_SETTINGS, benchmark: str = ""
) -> list[Leak]:
    """Every pair of a row and a question that it holds, by row, then in the questions' order; `where` is left empty.

    Memory does not grow with the number of rows, but for the leaks that are found.
    """
    lookups = _lookups(questions, settings)
    leaks: list[Leak] = []
    for start, parts in _normalised(rows):
        best: dict[tuple[int, int], Leak] = {}
        texts = ["".join(row) for row in parts]
        for lookup in lookups:
            for position, owner, share in find_candidates(lookup.index, texts, lookup.least_share):
                needle = lookup.needles[owner]
                key = (start + position, needle.question)
                judged = _judge(parts[position], needle, share if lookup.of_text else 0.0, settings)
                if judged and (key not in best or best[key].similarity < judged[0]):
                    similarity, kind, overlap = judged
                    problem_id = questions[needle.question].problem_id
                    best[key] = Leak(key[0], "", benchmark, problem_id, kind, needle.language, similarity, round(share, 3), overlap)
        leaks.extend(best[key] for key in sorted(best))
    return leaks


def count_short(questions: Sequence[Question], settings: LeakSettings = DEFAULT_LEAK_SETTINGS) -> int:
    """Questions whose Japanese text is no leak by itself: they are found only together with their answer or choices."""
    return sum(len(normalise(question.text)) < settings.long for question in questions)


def _normalised(rows: Sequence[Instruction]) -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    """(position of the first row, normalised instruction, input and output of each) of as many rows as are looked at together."""
    start, characters, chunk = 0, 0, []
    for position, row in enumerate(rows):
        chunk.append((normalise(row.instruction), normalise(row.input), normalise(row.output)))
        characters += sum(map(len, chunk[-1]))
        if characters >= CHUNK_CHARACTERS:
            yield start, chunk
            start, characters, chunk = position + 1, 0, []
    if chunk:
        yield start, chunk


def _lookups(questions: Sequence[Question], settings: LeakSettings) -> list[_Lookup]:
    """Texts, translations, and the choices beside short texts."""
    lookups = []
    for language, length, long in _languages(settings):
        needles = [needle for i, question in enumerate(questions) if (needle := _needle(i, question, language, long)).text]
        index = build_index([needle.text for needle in needles], length, _most(needles, settings))
        needles = [replace(needle, common=bool(index.common[i])) for i, needle in enumerate(needles)]
        lookups.append(_Lookup(needles, index, settings.least_share, of_text=True))
    short = [needle for needle in lookups[0].needles if not needle.long]
    index = build_index(["".join(needle.choices) for needle in short], settings.ngram_choices, _most(short, settings))
    return [*lookups, _Lookup(short, index, settings.least_share_choices, of_text=False)]


def _languages(settings: LeakSettings) -> list[tuple[Literal["ja", "en"], int, int]]:
    return [("ja", settings.ngram, settings.long), ("en", settings.ngram_en, settings.long_en)]


def _most(needles: list[_Needle], settings: LeakSettings) -> int:
    """How many questions may share an n-gram that is not boilerplate."""
    return max(3, int(settings.boilerplate * len(needles)))


def _needle(position: int, question: Question, language: Literal["ja", "en"], long: int) -> _Needle:
    text, choices = (question.text, question.choices) if language == "ja" else (question.facts.question_en, question.facts.choices_en)
    text = normalise(text)
    gold = [choices[i] for i in question.gold if i < len(choices)] or [question.value]
    return _Needle(position, language, text, tuple(map(normalise, choices)), tuple(map(normalise, gold)), len(text) >= long)


def _judge(row: tuple[str, str, str], needle: _Needle, share: float, settings: LeakSettings) -> tuple[float, Kind, str] | None:
    """Similarity, kind and overlap where the row holds the question; `share` is that of the text's rare n-grams."""
    instruction, given, output = row
    text = instruction + given + output
    fields = "\n".join(row)  # no choice begins at the end of one and ends at the start of the next
    answer_here = _answer_here(fields, output, needle)
    least = _least_similarity(needle, share, _choices_here(fields, needle), answer_here, settings)
    if least is None:
        return None
    similarity, overlap = _place(needle.text, text, least)
    if similarity < least and given and instruction:
        # a case may stand in the input and what is asked about it in the instruction
        similarity, overlap = _place(needle.text, given + instruction + output, least)
    if similarity < least:
        return None
    return round(similarity, 1), "question and answer" if answer_here else "question", _shortened(overlap)


def _least_similarity(needle: _Needle, share: float, choices_here: float, answer_here: bool, settings: LeakSettings) -> float | None:
    """How similar the text must be for a leak; None where no similarity would do.

    - Every choice in the row: the text may be reworded.
    - A long text speaks for itself.
    - A short one (「糖尿病の治療で正しいのはどれか。」) is asked in many exams: its rare words must be there,
      and the right answer or half of the choices.
    - A short one of nothing but the exam's phrases needs every choice.
    """
    if choices_here == 1 and not needle.common:
        return settings.similarity_beside_choices
    if needle.long or choices_here == 1:
        return settings.similarity
    says_something = not needle.common and share >= settings.least_share_short
    return settings.similarity if says_something and (answer_here or choices_here >= 0.5) else None


def _choices_here(text: str, needle: _Needle) -> float:
    """Share of the choices that stand in the row.

    Single characters count only all together in their order, and then as half: many questions have the choices 1 to 5.
    """
    if not needle.choices:
        return 0.0
    together = "".join(needle.choices)
    if together and together in text:
        return 1.0 if len(together) >= 2 * len(needle.choices) else 0.5
    return sum(_stands_beside(choice, text, needle) for choice in needle.choices) / len(needle.choices)


def _answer_here(text: str, output: str, needle: _Needle) -> bool:
    together = "".join(needle.gold)
    return (together != "" and output == together) or all(_stands_beside(answer, text, needle) for answer in needle.gold)


def _stands_beside(part: str, text: str, needle: _Needle) -> bool:
    """Whether `part` occurs in the row apart from its occurrences in the question's own text."""
    return len(part) >= 2 and text.count(part) > needle.text.count(part)


def _place(needle: str, text: str, least: float) -> tuple[float, str]:
    """The similarity of `needle` and its best place in `text`, 0 if below `least`; a text that is shorter is compared as a whole.

    Otherwise the short text would be looked for in the question: 「どれか」 stands in nearly all of them.
    """
    if len(text) < len(needle):
        return fuzz.ratio(needle, text, score_cutoff=least), text
    found = fuzz.partial_ratio_alignment(needle, text, score_cutoff=least)
    return (found.score, text[found.dest_start : found.dest_end]) if found else (0.0, "")


def _shortened(text: str) -> str:
    half = OVERLAP_CHARACTERS // 2
    return text if len(text) <= OVERLAP_CHARACTERS else f"{text[:half]}…{text[-half:]}"
