"""What the README shows can be typed as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jmedlora.cli import app
from jmedlora.config.benchmark import MetricSettings
from jmedlora.config.compose import load_sweep

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
YAML_BLOCKS = re.findall(r"```yaml\n(.*?)```", README + EVALUATION, flags=re.DOTALL)
GRID = "grid: {model: [tiny-llama], method: [lora], epochs: [1]}\n"


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=range(len(YAML_BLOCKS)))
def test_its_sweep_files_are_read(block: str, tmp_path: Path) -> None:
    for place in ("/data/IgakuQA", "/models/ours-7b"):
        (tmp_path / place.lstrip("/")).mkdir(parents=True)
        block = block.replace(place, str(tmp_path / place.lstrip("/")))
    (tmp_path / "instructions.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "mine.yaml").write_text(block if "grid:" in block else GRID + block, encoding="utf-8")
    assert load_sweep(str(tmp_path / "mine.yaml")).grids


def test_its_first_lines_are_the_two_commands() -> None:
    lines = [line for line in README.splitlines() if line.strip()]
    assert lines[0] == "# jmedlora"
    assert lines[2].startswith("make quickstart")
    assert lines[3].startswith("make test")


def test_every_command_it_names_exists_and_every_command_is_named() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    assert set(re.findall(r"^\| `jmedlora (\w+)", README, flags=re.MULTILINE)) == known


def test_the_settings_that_the_evaluation_page_lists_are_all_there_are() -> None:
    table = re.findall(r"^\| `(\w+)` \| `(\w+)`", EVALUATION, flags=re.MULTILINE)
    defaults = {name: str(value).lower() for name, value in MetricSettings().model_dump().items()}
    assert dict(table) == defaults


def test_every_file_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_its_plan_commands_work() -> None:
    commands = re.findall(r"`jmedlora plan (\S+)((?: [^`\s]+=[^`\s]+)*)`", README)
    assert len(commands) >= 2
    for sweep, overrides in commands:
        if sweep != "SWEEP":
            assert load_sweep(sweep, overrides.split()).name == sweep
