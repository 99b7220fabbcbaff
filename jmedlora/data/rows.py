"""The two row types that everything else handles."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

LETTERS = "abcdefghij"


def is_unicode(text: str) -> bool:
    """False for a text with half a surrogate pair, which JSON can spell (`"\\ud800"`) but UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Instruction:
    """A training row: answer `output` to `instruction`, given `input` (may be empty).

    A row made from a question also knows its choices, the letters of the right ones and how many are right.
    """

    instruction: str
    input: str
    output: str
    choices: tuple[str, ...] = ()
    letters: str = ""
    """Letters of the right choices, joined by a comma; empty for rows without choices."""
    count: int = 0
    """How many choices are right."""

    def as_dict(self) -> dict[str, Any]:
        """What the row says, in JSON's types; a row without choices has none of the keys that belong to them."""
        row = {"instruction": self.instruction, "input": self.input, "output": self.output}
        return row if not self.choices else row | {"choices": list(self.choices), "letters": self.letters, "count": self.count}


@dataclass(frozen=True)
class QuestionFacts:
    """What is known of a question beside what is asked; nothing here changes a prediction."""

    points: int = 1
    section: str = ""
    """Letter of the exam's section."""
    category: str = ""
    prohibited: tuple[int, ...] = ()
    """Positions of the choices that a candidate must not pick."""
    human_accuracy: float | None = None
    """Share of candidates who answered rightly, from 0 to 1."""
    question_en: str = ""
    choices_en: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """An exam question; `gold` holds positions in `choices`, in ascending order; empty where there are no choices."""

    problem_id: str
    text: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    year: int | None = None
    text_only: bool = True
    alternatives: tuple[tuple[int, ...], ...] = ()
    """Further sets of positions that count as right (an answer such as `a or d`)."""
    value: str = ""
    """The right answer of a question without choices, such as a number."""
    facts: QuestionFacts = field(default_factory=QuestionFacts)

    @property
    def answer(self) -> str:
        """The right choices' texts, joined by a comma where there are several; a question without choices has its value."""
        return ",".join(self.choices[i] for i in self.gold) if self.gold else self.value

    @property
    def letters(self) -> str:
        """The right choices' letters, joined by a comma."""
        return ",".join(LETTERS[i] for i in self.gold)

    def as_instruction(self) -> Instruction:
        """The question as a row: choices joined by a comma, without letters, answered with the choice's text."""
        return Instruction(self.text, ",".join(self.choices), self.answer, self.choices, self.letters, len(self.gold))

    def in_language(self, language: Literal["ja", "en"]) -> Question:
        """The question itself, or its English translation; raises ValueError where there is none."""
        if language == "ja":
            return self
        if not self.facts.question_en or len(self.facts.choices_en) != len(self.choices):
            raise ValueError(f"{self.problem_id} has no English translation")
        return replace(self, text=self.facts.question_en, choices=self.facts.choices_en)

    def as_dict(self) -> dict[str, Any]:
        """What identifies the question: all but what is known beside it; an English translation counts where there is one."""
        row = asdict(self)
        facts = row.pop("facts")
        return row | {key: facts[key] for key in ("question_en", "choices_en") if facts[key]}
