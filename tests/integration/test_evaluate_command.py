"""`jmedlora evaluate`: one system in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jmedlora.config.locate import cache_dir
from tests.integration.api_servers import api_server
from tests.integration.processes import run_jmedlora

SETTINGS = ("evaluate.max_new_tokens=6", "evaluate.batch_size=8")


def systems(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run_jmedlora("evaluate", *arguments, *SETTINGS, "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_a_base_is_scored_in_both_ways_with_intervals_and_not_asked_twice(tmp_path: Path) -> None:
    options = (
        "tiny-llama",
        "--first",
        "6",
        "--shots",
        "0,1",
        "--scoring",
        "generate,loglikelihood",
        "--prompt",
        "alpaca-ja",
        "--prompt",
        "exam-ja",
    )
    found = systems(tmp_path, *options)
    assert [(one["prompt"], one["shots"], one["scoring"]) for one in found] == [
        (prompt, shots, scoring) for prompt in ("alpaca-ja", "exam-ja") for shots in (0, 1) for scoring in ("generate", "loglikelihood")
    ]
    for one in found:
        assert one["system"] == "tiny-llama" and one["n"] == 6
        assert one["accuracy_low"] <= one["accuracy"] <= one["accuracy_high"]
        if one["scoring"] == "loglikelihood":
            assert set(one["accuracy_by_normalisation"]) == {"sum", "per_token", "per_character", "per_byte"}
    assert systems(tmp_path, *options) == found  # the times among them too: nothing was computed
    shown = run_jmedlora("evaluate", *options, *SETTINGS, cwd=tmp_path)
    assert "sample, prompt exam-ja" in shown.stdout and "likelihood" in shown.stdout and "0.000-0." in shown.stdout


def test_an_adapter_is_scored_beside_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path / "cache"))
    systems(tmp_path, "tiny-llama", "--first", "2")  # which builds the base
    base = next((cache_dir() / "models").glob("tiny-llama-*[0-9a-f]"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    adapter = tmp_path / "foreign"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)  # as PEFT itself writes it
    found = systems(tmp_path, "tiny-llama", "--first", "4", "--adapter", str(adapter))
    assert [one["system"] for one in found] == ["tiny-llama", "tiny-llama + foreign"]
    assert found[0]["adapter_digest"] is None and found[1]["adapter_digest"]
    assert found[0]["run_key"] != found[1]["run_key"]
    again = systems(tmp_path, "tiny-llama", "--first", "4", "--adapter", str(adapter), "evaluate.metrics=harness")
    assert [one["metric_settings"]["order"] for one in again] == ["mean", "mean"]  # scored anew, both of them
    assert [one["time"] for one in again] == [one["time"] for one in found]
    missing = run_jmedlora("evaluate", "tiny-llama", "--adapter", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert missing.returncode == 2 and "--adapter" in missing.stderr
    for model, told in (
        (("tiny-gpt-neox",), "--adapter: "),
        (("served", "--base-url", "http://127.0.0.1:9/v1"), "--adapter: served is behind an address"),
    ):
        wrong = run_jmedlora("evaluate", *model, "--first", "2", "--adapter", str(adapter), *SETTINGS, cwd=tmp_path)
        assert wrong.returncode == 2 and told in wrong.stderr and "Traceback" not in wrong.stderr, wrong.stderr


def test_a_folder_in_hugging_face_format_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path / "cache"))
    systems(tmp_path, "tiny-llama", "--first", "2")
    folder = next((cache_dir() / "models").glob("tiny-llama-*[0-9a-f]"))
    found = systems(tmp_path, str(folder), "--first", "2")
    assert found[0]["system"] == folder.name


def test_an_address_that_fails_ends_with_1_and_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_API_KEY", "sk-not-to-be-seen")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-alone")
    is_ill = True
    with api_server(lambda prompt, attempt: "401" if is_ill and "胆汁" in prompt else "ok") as server:
        url = server.url
        done = run_jmedlora("evaluate", "served", "--base-url", url, "--first", "5", cwd=tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "goes on from here" in done.stderr
        asked = server.requests
        is_ill = False
        found = json.loads(run_jmedlora("evaluate", "served", "--base-url", url, "--first", "5", "--json", cwd=tmp_path).stdout)
        assert found[0]["n"] == 5 and found[0]["cached_answers"] == 5 - (server.requests - asked)
        assert server.authorisations == {"Bearer sk-not-to-be-seen"}
        after = server.requests
        run_jmedlora("evaluate", "served", "--base-url", url, "--first", "5", cwd=tmp_path)
        assert server.requests == after
    assert not any("sk-not-to-be-seen" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("tiny-lama",), "did you mean 'tiny-llama'"),
        (("tiny-llama", "--shots", "0,x"), "--shots"),
        (("tiny-llama", "--scoring", "guess"), "generate or loglikelihood"),
        (("tiny-llama", "--benchmark", "sampel"), "did you mean 'sample'"),
        (("tiny-llama", "--data", "/nowhere"), "/nowhere does not exist"),
        (("tiny-llama", "--shots", "9"), "at most 3"),
        (("m", "--base-url", "ftp://x"), "http:// or https://"),
        (("m", "--base-url", "http://127.0.0.1:9/v1", "--scoring", "loglikelihood"), "generate among the ways"),
        (("m", "--base-url", "http://127.0.0.1:9/v1", "--completions", "--prompt", "chat-ja"), "plain text"),
        (("m", "--base-url", "http://example.org/v1", "offline=true"), "offline"),
    ],
)
def test_bad_input_is_told_in_lines_and_writes_nothing(options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run_jmedlora("evaluate", *options, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert all(line.startswith("jmedlora: ") for line in done.stderr.strip().splitlines())
    assert not list(tmp_path.iterdir())
