"""The two row types that everything else handles."""

from __future__ import annotations

from dataclasses import asdict, dataclass

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
    """A training row: answer `output` to `instruction`, given `input` (may be empty)."""

    instruction: str
    input: str
    output: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


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

    @property
    def answer(self) -> str:
        """The right choices' texts, joined by a comma where there are several."""
        return ",".join(self.choices[i] for i in self.gold)

    def as_instruction(self) -> Instruction:
        """The question as a row: choices joined by a comma, without letters, answered with the choice's text."""
        return Instruction(self.text, ",".join(self.choices), self.answer)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
