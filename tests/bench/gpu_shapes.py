"""The shapes that a GPU is measured with: those of the study's models and their kin, and tiny ones for a dry run."""

from __future__ import annotations

from jmedlora.config.parts import Architecture
from tests.bench.rig import Case

CALM_7B = Architecture(layers=32, hidden_size=4096, intermediate_size=16384, heads=32, kv_heads=32, vocabulary=52224)
LLAMA_7B = Architecture(
    layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, vocabulary=32000, max_positions=4096
)
LLAMA_13B = Architecture(
    layers=40, hidden_size=5120, intermediate_size=13824, heads=40, kv_heads=40, vocabulary=32000, max_positions=4096
)
LLAMA_70B = Architecture(
    layers=80, hidden_size=8192, intermediate_size=28672, heads=64, kv_heads=8, vocabulary=32000, max_positions=4096
)
TINY_LLAMA = Architecture(layers=3, hidden_size=128, intermediate_size=344, heads=4, kv_heads=2, vocabulary=512, max_positions=2048)
TINY_NEOX = Architecture(layers=3, hidden_size=128, intermediate_size=512, heads=4, kv_heads=4, vocabulary=512)


def base_cases(tiny: bool) -> dict[str, Case]:
    """One case per model: the study's settings, 512 tokens of prompt and 512 of answer."""
    calm, small, middle, large = (TINY_NEOX, TINY_LLAMA, TINY_LLAMA, TINY_LLAMA) if tiny else (CALM_7B, LLAMA_7B, LLAMA_13B, LLAMA_70B)
    length = {"input_tokens": 32, "target_tokens": 32} if tiny else {"input_tokens": 512, "target_tokens": 512}
    lora = {"precision": "bf16", "compute": "bf16", "rank": 8, "dropout": 0.05, "accumulated": 2, **length}
    qlora = {**lora, "precision": "nf4", "rank": 64, "targets": "all-linear", "dropout": 0.1, "checkpointing": True}
    return {
        "calm-7b": Case("open-calm-7b", "gpt_neox", calm, **lora),  # type: ignore[arg-type]
        "llama-7b": Case("llama2-7b", "llama", small, **lora),  # type: ignore[arg-type]
        "llama-13b": Case("llama2-13b", "llama", middle, **qlora),  # type: ignore[arg-type]
        "llama-70b": Case("llama2-70b", "llama", large, **qlora),  # type: ignore[arg-type]
    }


def memory_cases(tiny: bool) -> list[Case]:
    """What is measured: those of one base model and precision follow each other, so that it is made once."""
    bases = base_cases(tiny)
    calm, llama, middle, large = (bases[name] for name in ("calm-7b", "llama-7b", "llama-13b", "llama-70b"))
    found = [calm.changed(rank=rank, rows=2) for rank in (8, 64, 128)]
    found += [calm.changed(rows=rows) for rows in (1, 4)]
    found += [calm.changed(rows=rows, checkpointing=True) for rows in (1, 4, 8)]
    found += [calm.changed(rows=2, targets="all-linear", rank=64, dropout=0.0), calm.changed(rows=2, stage=2, rank=64)]
    found += [llama.changed(rows=rows, rank=64) for rows in (1, 4)]
    found += [llama.changed(rows=rows, rank=64, checkpointing=True) for rows in (1, 8)]
    found += [llama.changed(rows=2, rank=256, targets="all-linear", checkpointing=True), llama.changed(rows=2, stage=3, checkpointing=True)]
    found += [middle.changed(rows=rows) for rows in (1, 4, 8)]
    found += [middle.changed(rows=1, checkpointing=False), middle.changed(rows=1, rank=128)]
    found += [large.changed(rows=1, rank=rank) for rank in (64, 128)] + [large.changed(rows=rows) for rows in (2, 4)]
    return found


def timing_cases(tiny: bool) -> list[Case]:
    """What is timed, ours against a plain loop."""
    bases = base_cases(tiny)
    return [
        bases["calm-7b"].changed(rows=8, rank=64, checkpointing=True, accumulated=1),
        bases["calm-7b"].changed(rows=2, rank=64, accumulated=4),
        bases["llama-7b"].changed(rows=8, rank=64, checkpointing=True, accumulated=1),
        bases["llama-13b"].changed(rows=4, accumulated=1),
        bases["llama-70b"].changed(rows=2, accumulated=1),
    ]
