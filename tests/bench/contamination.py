"""How long the search for leaks takes and what it finds: `python -m tests.bench.contamination --rows 77422 --questions 2000`.

Rows and questions come from the same seeded generator of Japanese sentences; a share of the rows holds a question in one
of the ways of `PLANTS`. Prints rows/s, seconds, peak memory, leaks found of those planted, and those that nobody planted.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import Counter

from jmedlora.data.contamination import find_leaks
from jmedlora.data.rows import Instruction, Question

KANJI = "心肺肝腎胃腸脳骨血膵脾膀胱甲状腺炎症候群癌腫瘍出栓塞不全変性硬化壊死欠乏亢進低下急慢先天後免疫感染神経筋膜動静脈リン酸塩酵素"
STEMS = (
    "{0}について正しいのはどれか。",
    "{0}で誤っているのはどれか。2つ選べ。",
    "{0}の治療で適切なのはどれか。",
    "{0}に{1}を合併した患者で、まず行うべき検査はどれか。",
)
CASE = (
    "{age}歳の{sex}。{0}を主訴に来院した。{days}日前から{1}が出現し、自宅で様子をみていたが改善しないため受診した。"
    "既往歴に{2}があり、{3}を内服中である。身長{height}cm、体重{weight}kg。体温{heat}℃。脈拍{pulse}/分、整。"
    "血液所見：赤血球{red}万、{4}陽性。{5}を認める。この患者で考えられるのはどれか。"
)
FACTS = ("{0}は{1}によって生じ、{2}を伴うことが多い。", "{0}の診断には{1}が有用である。", "{0}では{1}を第一選択とし、{2}を併用する。")


def term(chance: random.Random) -> str:
    """A made-up medical word."""
    return "".join(chance.choices(KANJI, k=chance.randint(2, 5)))


def terms(chance: random.Random, count: int) -> list[str]:
    return [term(chance) for _ in range(count)]


def question_text(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return chance.choice(STEMS).format(*terms(chance, 2))
    numbers = {"age": (20, 90), "days": (2, 14), "height": (145, 185), "weight": (40, 90), "pulse": (60, 120), "red": (250, 550)}
    drawn = {key: chance.randint(*limits) for key, limits in numbers.items()}
    return CASE.format(*terms(chance, 6), sex=chance.choice(("男性", "女性")), heat=f"{chance.uniform(36, 40):.1f}", **drawn)


def make_question(chance: random.Random, place: int) -> Question:
    return Question(f"Q{place}", question_text(chance), tuple(terms(chance, 5)), (chance.randrange(5),))


def make_row(chance: random.Random) -> Instruction:
    """A row like those made from articles (a question and an answer in sentences), or an exam question of its own."""
    if chance.random() < 0.3:
        return make_question(chance, 0).as_instruction()
    facts = "".join(chance.choice(FACTS).format(*terms(chance, 3)) for _ in range(chance.randint(1, 5)))
    return Instruction(f"{term(chance)}の{term(chance)}について説明してください。", "", facts)


def wide(text: str) -> str:
    """Digits and punctuation as another source would write them."""
    return text.translate(str.maketrans("0123456789。、", "０１２３４５６７８９．，"))


def reworded(text: str, chance: random.Random) -> str:
    """Two characters in the text's first half replaced by a word."""
    place = chance.randrange(len(text) // 2)
    return text[:place] + chance.choice(("小児", "再発性", "投与")) + text[place + 2 :]


def plant(way: str, question: Question, chance: random.Random) -> Instruction:
    choices, filler = ",".join(question.choices), make_row(chance)
    half = len(question.text) // 2
    return {
        "copy": Instruction(question.text, choices, question.answer),
        "punctuation": Instruction(wide(question.text), " / ".join(question.choices), f"【{question.answer}】"),
        "reworded": Instruction(reworded(question.text, chance), choices, question.answer),
        "embedded": Instruction(filler.instruction, f"{filler.output}例題：{question.text}{choices}", filler.output + question.answer),
        "split": Instruction(question.text[:half], question.text[half:] + choices, question.answer),
        "answer in words": Instruction(question.text, "", f"正解は{question.answer}である。{filler.output}"),
    }[way]


PLANTS = ("copy", "punctuation", "reworded", "embedded", "split", "answer in words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=77_422)
    parser.add_argument("--questions", type=int, default=2_000)
    parser.add_argument("--planted", type=float, default=0.01, help="share of rows that hold a question")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    questions = [make_question(chance, place) for place in range(given.questions)]
    rows: list[Instruction] = []
    planted: dict[int, tuple[str, str]] = {}
    for place in range(given.rows):
        if chance.random() < given.planted:
            way, question = chance.choice(PLANTS), chance.choice(questions)
            planted[place] = (way, question.problem_id)
            rows.append(plant(way, question, chance))
        else:
            rows.append(make_row(chance))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    leaks = find_leaks(rows, questions)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {(leak.row, leak.problem_id) for leak in leaks}
    right = {(row, problem_id) for row, (_, problem_id) in planted.items()}
    ways = Counter(way for way, _ in planted.values())
    found_ways = Counter(planted[row][0] for row, _ in found & right)
    characters = sum(len(row.instruction) + len(row.input) + len(row.output) for row in rows)
    report = {
        "rows": given.rows,
        "questions": given.questions,
        "characters_per_row": round(characters / given.rows, 1),
        "seconds": round(seconds, 2),
        "rows_per_s": round(given.rows / seconds),
        "peak_mb_before": round(before),
        "peak_mb": round(after),
        "planted": len(right),
        "found": len(found & right),
        "found_by_way": {way: f"{found_ways[way]} of {ways[way]}" for way in PLANTS},
        "not_planted": len(found - right),
    }
    print(json.dumps(report, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
