"""Which choices a response names by their letters, and the number that it gives where there are no choices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from jmedlora.data.rows import LETTERS

# Characters by what they say about a letter beside them.
_LATIN = r"a-z0-9\u00df-\u024f\u0370-\u03ff"
_WRITTEN = r"\u3400-\u9fff\uf900-\ufaff々〆\u30a1-\u30fa\u30fc-\u30ff"
"""Kanji and katakana: a letter that touches them belongs to a word, such as B型肝炎 or ビタミンC."""
_HIRAGANA = r"\u3041-\u309f"
_OPEN, _CLOSE = r"(\[{<「『【〈《\"'“‘`*_$", r")\]}>」』】〉》\"'”’`*_$"
_JOIN = r"[,、・/&+;]|と|や|か|及び|および|又は|または|若しくは|もしくは|並びに|ならびに|and\b|or\b"

_LAST_FOREIGN = "h"
"""Letters up to this one spoil a group even where there are fewer choices: `a,f` of five choices is no answer. `I` is a word."""

_ANNOUNCING = r"(?:答え|(?<!解)(?<!回)(?<!正)答|(?<!不)正解|解答|回答|正答|answers?)"
_FILLER = (
    rf"(?:[\s:=→,、.\-—はがのも{_OPEN}{_CLOSE}]|です|選択肢|番号|記号"
    r"|is|are|was|be|would|should|must|the|option|choice|letter|correct|both|either)"
)
_ANNOUNCED = re.compile(rf"{_ANNOUNCING}{_FILLER}*$")
_CONTEXT = 60
"""Characters before and after a letter that are looked at."""
_LABELLED = re.compile(r"(?:選択肢|記号|番号|番|肢|問|オプション)$")
_BEFORE = re.compile(
    r"answers?|is|are|be|options?|choices?|letters?|and|or|both|either|select(?:ed)?|choose|chose|pick|correct|therefore|thus|so"
    r"|statements?|alternatives?|items?"
)
"""English words after which a lone letter is a choice; after others (vitamin C, not B) it is not."""
_AFTER_LETTER = re.compile(r"and|or|is|are|was|because|since|as|but")
"""English words before which a lone `a` or `i` is a letter and no word of its own."""
_LAST_WORD = re.compile(rf"([{_LATIN}]+)$")
_NEXT_WORD = re.compile(r"\s+([a-z]+)")
_DENYING = re.compile(r"不正解[はがのも:\s]*$")
_DENIED = re.compile(r"\s*(?:(?:で|じゃ)は?(?:な[いく]|あり)|[はが](?:誤|間違|不)|(?:is|are)\s+(?:not|wrong|incorrect|false)\b)")
_PART_OF_A_WORD = re.compile(rf"[{_WRITTEN}]|[-‐–~〜][{_LATIN}{_WRITTEN}]|[/'’][{_LATIN}]|\.[{_LATIN}](?![{_LATIN}])")
_JOINED_WORD = re.compile(rf"[{_LATIN}{_WRITTEN}][-‐–~〜/.'’]$")
_ENDING = re.compile(r"(?:です|である|だ)?[\s.。!)]*$")
_DECORATION = re.compile(rf"[\s,、・/&+;:.。!\-{_OPEN}{_CLOSE}]")


def parse_letters(text: str, choices_count: int, expected: int) -> tuple[int, ...]:
    """Positions of the choices that a text names by letter, each once, in the order of the text; empty where it names none.

    The rules, after NFKC (full width becomes half width) and case folding:

    1. A letter counts when it stands alone: at the text's beginning or end, beside blanks, punctuation, brackets or
       hiragana. A letter that touches kanji, katakana, other letters or digits is part of a word (`B型肝炎`, `B12`), unless
       a labelling word stands before it (`選択肢c`, `正解c`).
    2. Letters with nothing but separators between them (comma, `と`, `and`, a blank …) are one group and are read together.
       A group with a letter that no choice has is passed over.
    3. After an English word a letter counts only where that word leads to an answer (`is`, `option`, `and` …): not in
       `vitamin C`, not in `not B`. `a` before a further English word is the article, unless that word is `and`, `is` or the like.
    4. Letters written together (`ac`) are a group where they are as many as `expected`, or the whole text.
    5. A group that the text denies (`aではなく`, `B is wrong`, `不正解はa`) is passed over.
    6. The last group that is announced (`答え：`, `正解は`, `The answer is`) is taken; without one the first group.
    7. While fewer than `expected` letters were found, groups that label a further part are added (`a. 痛風、c. 喘息`).
       Groups are never cut: who names two choices where one is asked for has named two.
    """
    if choices_count < 1:
        return ()
    folded = _folded(text)
    groups = _named_groups(folded, LETTERS[:choices_count], expected)
    if not groups:
        return ()
    first = max((i for i, group in enumerate(groups) if group.is_announced), default=0)
    found = list(groups[first].letters)
    for group in groups[first + 1 :]:
        if len(set(found)) >= expected:
            break
        if group.is_label:
            found += group.letters
    return tuple(LETTERS.index(letter) for letter in dict.fromkeys(found))


def names_exactly(text: str, positions: Sequence[int]) -> bool:
    """Whether a text is nothing but the letters of these choices, in any order, with blanks, brackets and separators."""
    letters = _DECORATION.sub("", _folded(text))
    return bool(positions) and sorted(letters) == [LETTERS[i] for i in sorted(positions)]


def _folded(text: str) -> str:
    """After NFKC and case folding, with LaTeX's commands (`\\boxed{c}`) as blanks, and one blank or line break for several."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"\s+", lambda blanks: "\n" if "\n" in blanks.group() else " ", folded)
    return re.sub(r"\\[a-z]+ ?(?=\{)", " ", folded)


@dataclass(frozen=True)
class _Group:
    """Letters that are read together."""

    letters: tuple[str, ...]
    is_announced: bool
    is_label: bool
    """Whether it stands as the label of a part of the text, not as a word in a sentence."""


@lru_cache(maxsize=len(LETTERS))
def _group_pattern(last: str) -> re.Pattern[str]:
    letter = rf"(?<![{_LATIN}])[a-{last}](?![{_LATIN}])"
    opening, closing = f"[{_OPEN}]{{0,8}}", f"[{_CLOSE}]"
    item = rf"{opening}\s?{letter}\s?{closing}{{1,8}}|{opening}{letter}"
    several = rf"(?:{item})(?:(?:(?:\s*(?:{_JOIN})\s*){{1,2}}|\s+|\.|(?<={closing})(?=[{_OPEN}]))(?:{item}))*"
    return re.compile(rf"{several}|{opening}(?<![{_LATIN}])[a-{last}]{{2,{len(LETTERS)}}}(?![{_LATIN}]){closing}{{0,8}}")


def _named_groups(text: str, allowed: str, expected: int) -> list[_Group]:
    """The groups of letters that name choices, in their order."""
    found = []
    last = max(allowed[-1], _LAST_FOREIGN)
    bare = len(_DECORATION.sub("", text))
    for match in _group_pattern(last).finditer(text):
        group = match.group()
        is_written_together = re.search(rf"[a-{last}]{{2}}", group) is not None
        letters = tuple(re.findall(rf"(?<![a-z])[a-{last}](?![a-z])", group)) or tuple(_DECORATION.sub("", group))
        if not set(letters) <= set(allowed) or (is_written_together and not _is_list(letters, bare, expected)):
            continue
        left, right = text[max(0, match.start() - _CONTEXT) : match.start()], text[match.end() : match.end() + _CONTEXT]
        is_bracketed = group[-1] != letters[-1]
        announced = _ANNOUNCED.search(left) is not None
        if _continues(group, letters, right, is_bracketed, is_written_together) and (announced or _introduces(left, right, is_bracketed)):
            begins = not left.strip() or left.rstrip()[-1] in ",、。.;・/" or left.endswith("\n")
            is_label = right[:1] == ":" or (begins and not re.match(rf"[{_HIRAGANA}]", right))
            found.append(_Group(letters, announced, is_label))
    return found


def _is_list(letters: tuple[str, ...], bare: int, expected: int) -> bool:
    """Whether letters written together are a list of choices and no word; `bare`: characters of the text without decoration."""
    if len(set(letters)) != len(letters):
        return False
    return len(letters) == expected or bare == len(letters)


def _introduces(left: str, right: str, is_bracketed: bool) -> bool:
    """Whether what stands before a group lets it name choices."""
    if _JOINED_WORD.search(left) or _DENYING.search(left):
        return False
    before = left.rstrip()
    if not before:
        return True
    if word := _LAST_WORD.search(before):
        return _BEFORE.fullmatch(word.group(1)) is not None or (is_bracketed and _ENDING.match(right) is not None)
    if re.search(rf"[{_WRITTEN}]$", before):
        if left != before and right[:1] in (":", "."):  # `c：痛風 d：喘息`
            return True
        return _LABELLED.search(before) is not None or (is_bracketed and _ENDING.match(right) is not None)
    return True


def _continues(group: str, letters: tuple[str, ...], right: str, is_bracketed: bool, is_written_together: bool) -> bool:
    """Whether what stands after a group lets it name choices."""
    if _DENIED.match(right):
        return False
    if is_bracketed:
        return True
    if _PART_OF_A_WORD.match(right) and not re.match("正(?:解|答|しい)|及び|又は", right):
        return False
    if word := _NEXT_WORD.match(right):
        if is_written_together:
            return False
        if letters[-1] in "ai" and not _AFTER_LETTER.fullmatch(word.group(1)):
            return False
    return True


# ---------------------------------------------------------------- numbers

_NUMBER = re.compile(r"(?<![0-9.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![0-9])")
_PLAIN_NUMBER = re.compile(r"[0-9０-９.．,，+＋\-−－]+")
"""Half and full width alone: NFKC makes digits of much else."""
_BOXES = "①②③④⑤⑥⑦⑧⑨⑩"
"""The exam numbers the boxes for an answer's digits; models repeat the marks in front of their digits."""
_BOXED_DIGITS = re.compile(rf"[{_BOXES}]\s*[=:]?\s*(\d)(?!\d)[\s,、]*([.．]?)[\s,、]*")


def parse_value(text: str) -> Decimal | None:
    """The number that a text gives as its answer, or None.

    After NFKC: of what follows the last announcement (`解答：`, `the answer is`), the first number; without one, or with no
    number behind it, the text's last number. Commas between thousands are read over, units too. The exam's marks for the
    boxes of an answer are no digits: `①2 ②6` and `①26` are both 26.
    """
    if len(_BOXED_DIGITS.findall(text)) > 1 and len(_BOXED_DIGITS.findall(text)) == sum(text.count(mark) for mark in _BOXES):
        text = _BOXED_DIGITS.sub(lambda box: box.group(1) + box.group(2), text)
    folded = unicodedata.normalize("NFKC", re.sub(rf"[{_BOXES}]", " ", text)).casefold().replace("−", "-")
    last = max((match.start() for match in re.finditer(_ANNOUNCING, folded)), default=None)
    if last is not None and (number := _NUMBER.search(folded, last)):
        return _decimal(number.group())
    numbers = _NUMBER.findall(folded)
    return _decimal(numbers[-1]) if numbers else None


def exact_value(text: str) -> Decimal | None:
    """The number that a text is, with nothing beside it; None for any other text."""
    plain = unicodedata.normalize("NFKC", text).strip().replace("−", "-")
    return _decimal(plain) if _PLAIN_NUMBER.fullmatch(text.strip()) and _NUMBER.fullmatch(plain) else None


def _decimal(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", ""))
    except InvalidOperation:  # more digits than a decimal number can have
        return None
