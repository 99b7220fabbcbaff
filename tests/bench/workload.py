"""The sweep that ratios are measured on: a random model with its tokenizer, rows to train on, questions to answer, and our file for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmedlora.config.locate import bundled_file

RANKS, EPOCHS = (4, 8, 16, 32), (1, 3, 10)
ROUND = 8
"""Rows of a mini-batch, in every arm."""
NEW_TOKENS = 32
LEARNING_RATE = 1e-3
PROMPT = "以下は医学の問題です。\n### 指示：\n{}\n### 入力：\n{}\n### 応答：\n"
_PARTS = re.compile(r"^以下は医学の問題です。\n### 指示：\n(.*)\n### 入力：\n(.*)\n### 応答：\n$", re.DOTALL)
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4},
    "tiny": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4},
}


@dataclass(frozen=True)
class Workload:
    """A folder with `model/` in Hugging Face format and `rows.json` (`train`, `questions`: prompt, choices, answer)."""

    folder: Path
    is_shared: bool
    """Made by the shared baseline's own script, which then is B0."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def rows(self, part: str) -> list[dict[str, Any]]:
        """`train` or `questions`."""
        found: list[dict[str, Any]] = json.loads((self.folder / "rows.json").read_text(encoding="utf-8"))[part]
        return found


def shared_baseline() -> Path | None:
    """The script of the plain baseline beside the shared exam data, where there is one."""
    place = os.environ.get("JMEDLORA_SHARED_DATA")
    script = Path(place).parent / "bench" / "plain_ray_tune.py" if place else None
    return script if script is not None and script.is_file() else None


def build(folder: Path, size: str, train: int, questions: int) -> Workload:
    """Builds the workload from real exam questions, or from the bundled synthetic rows where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    script = shared_baseline()
    if script is not None:
        data = Path(os.environ["JMEDLORA_SHARED_DATA"]) / "igakuqa"
        asked = ["--data", str(data), "--work", str(folder), "--size", size, "--train", str(train), "--questions", str(questions)]
        subprocess.run([sys.executable, str(script), "build", *asked], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    else:
        _build_bundled(folder, size, train, questions)
    return Workload(folder, script is not None)


def _build_bundled(folder: Path, size: str, train: int, questions: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jmedlora.models.random_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8000, num_key_value_heads=4, max_position_embeddings=1024, **SHAPES[size])
    config.pad_token_id, config.bos_token_id, config.eos_token_id = tokenizer.pad_token_id, None, tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = [json.loads(line) for line in bundled_file("sample/questions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "prompt": PROMPT.format(row["problem_text"], ",".join(row["choices"])),
            "choices": row["choices"],
            "answer": row["choices"]["abcde".index(row["answer"][0])],
        }
        for row in lines
    ]
    several = rows * (1 + max(train, questions) // len(rows))
    told = {"train": several[:train], "questions": several[:questions]}
    (folder / "rows.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def write_sweep(workload: Workload, folder: Path, **keys: Any) -> Path:
    """Our sweep file for the workload, in `folder`, with what it reads; further keys of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in workload.rows("train"):
        found = _PARTS.match(row["prompt"])
        assert found is not None
        rows.append({"instruction": found[1], "input": found[2], "output": row["answer"]})
    questions = []
    for place, row in enumerate(workload.rows("questions")):
        found = _PARTS.match(row["prompt"])
        assert found is not None
        letter = "abcde"[row["choices"].index(row["answer"])]
        questions.append(
            {"problem_id": f"q{place:03d}", "problem_text": found[1], "choices": row["choices"], "text_only": True, "answer": [letter]}
        )
    for name, lines in (("train", rows), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (folder / "prompt").mkdir(exist_ok=True)
    example = PROMPT.format("{{ example.instruction }}", "{{ example.input }}") + "{{ example.output }}\n"
    examples = f"{{% for example in examples %}}{example}{{% endfor %}}"
    template = {"template": examples + PROMPT.format("{{ instruction }}", "{{ input }}")}
    (folder / "prompt" / "bench.yaml").write_text(json.dumps(template, ensure_ascii=False), encoding="utf-8")
    file = folder / "bench.yaml"
    told = {
        "grid": {
            "model": [{"name": "bench", "family": "llama", "source": {"kind": "path", "path": str(workload.model)}}],
            "method": ["lora"],
            "rank": list(RANKS),
            "epochs": list(EPOCHS),
        },
        "data": {"name": "bench-train", "path": str(folder / "train.jsonl")},
        "benchmarks": [{"name": "bench-questions", "path": str(folder / "questions.jsonl")}],
        "shots": [0],
        "prompts": ["bench"],
        "training": {
            "prompt": "bench", "alpha": "2r", "targets": "all-linear", "dropout": 0.0, "learning_rate": LEARNING_RATE, "weight_decay": 0.0,
            "schedule": "constant", "batch_size": ROUND, "max_grad_norm": 1.0, "max_input_tokens": 480, "max_target_tokens": 32,
        },
        "evaluate": {"every": "end", "max_new_tokens": NEW_TOKENS, "batch_size": ROUND},
        "resources": "local",
        "leaks": "allow",
        **keys,
    }  # fmt: skip
    file.write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")  # JSON is YAML
    return file
