"""Where packs pay: `python -m tests.bench.crossover --out FILE` steps adapters packed and one by one, over tokens and numbers of adapters.

On the GPU where there is one, else on one core; plain PEFT as a third arm. Writes a JSON list as it goes, and a plot of it with
`--plot FILE`; `--from FILE` measures nothing and plots what that file holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.measuring import in_turns, machine
from tests.bench.workload import RANKS

TOKENS = (32, 64, 128, 256, 512, 1024, 2048)
ADAPTERS = (1, 2, 4, 8, 12)
LONGEST_ROW = 256
ENOUGH_TOKENS = 4096
"""Of all adapters in a turn; more steps where they are small."""


def measured(size: str, tokens: int, adapters: int, pairs: int) -> dict[str, Any]:
    """A point: seconds of a step of all adapters, packed, one by one, and with plain PEFT, in turns."""
    from tests.bench.steps import Work, one_by_one, ours

    rows = max(1, tokens // LONGEST_ROW)
    width = tokens // rows
    ranks = [RANKS[place % len(RANKS)] for place in range(adapters)]
    work = Work(size, ranks, rows, width - width // 4, width // 4, max(1, ENOUGH_TOKENS // (tokens * adapters)))
    arms = in_turns([ours(work, adapters), ours(work, 1), one_by_one(work, True)], pairs)
    packed, alone, plain = (statistics.median(each.amount for each in taken) / work.steps for taken in arms)
    return {
        "size": size, "tokens": tokens, "adapters": adapters, "packed_s": packed, "one_by_one_s": alone, "plain_s": plain,
        "auto": work.pack(), "machine": machine(),
    }  # fmt: skip


def plot(points: Sequence[dict[str, Any]], file: Path) -> None:
    """How many times as fast packed is as one by one, over tokens; a panel for each size, a line for each number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(point["size"] for point in points))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), sharey=True, squeeze=False, layout="constrained")
    for panel, size in zip(panels[0], sizes, strict=True):
        for adapters in sorted({point["adapters"] for point in points} - {1}):
            own = sorted(
                (point for point in points if point["size"] == size and point["adapters"] == adapters), key=lambda each: each["tokens"]
            )
            ratios = [point["one_by_one_s"] / point["packed_s"] for point in own]
            panel.plot([point["tokens"] for point in own], ratios, marker="o", label=f"{adapters} adapters")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xscale="log", title=size, xlabel="tokens per adapter and step")
        panel.set_xticks(TOKENS, [str(tokens) for tokens in TOKENS], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("packed, times as fast as one by one")
    panels[0][-1].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("results/bench/crossover.json"))
    parser.add_argument("--plot", type=Path, help="a PNG, too")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: plot what this file holds")
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--adapters", default=",".join(map(str, ADAPTERS)))
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    points: list[dict[str, Any]] = []
    if asked.source:
        points = json.loads(asked.source.read_text(encoding="utf-8"))
    else:
        import torch

        torch.set_num_threads(1)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        for size in asked.sizes.split(","):
            for tokens in map(int, asked.tokens.split(",")):
                for adapters in map(int, asked.adapters.split(",")):
                    points.append(measured(size, tokens, adapters, asked.pairs))
                    asked.out.write_text(json.dumps(points, indent=1), encoding="utf-8")
                    print(points[-1], flush=True)
    if asked.plot:
        plot(points, asked.plot)


if __name__ == "__main__":
    main()
