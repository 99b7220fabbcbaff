"""Sources, loading, LoRA layers and adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from jmedlora.config.faults import BadInput
from jmedlora.config.locate import cache_dir
from jmedlora.config.parts import Architecture, GgufSource, HubSource, ModelConfig, NamedSource, PathSource
from jmedlora.config.run import RunSettings
from jmedlora.models.adapters import base_name, save_adapter
from jmedlora.models.dropout import DropoutContext, KeyedDropout
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.lora import attach_lora, target_modules
from jmedlora.models.random_models import build_model
from jmedlora.models.source import SourceMissing, materialise
from jmedlora.plan.checksums import AdapterDamaged, adapter_digest, verify
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _settings(**chosen: Any) -> RunSettings:
    return RunSettings.model_validate({"model": "m", "method": "lora", "data": "d", "prompt": "p", "epochs": 1, "rank": 4, **chosen})


def _base(family: Any = "llama", precision: Any = "fp32") -> PreTrainedModel:
    return load_base(materialise(tiny_model(family), Path("unused"), True), precision, "fp32", True, "cpu")


def _with_source(source: Any) -> ModelConfig:
    return tiny_model("llama").model_copy(update={"source": source})


def _weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in adapted.named_parameters() if value.requires_grad}


# ---------------------------------------------------------------- sources


def test_a_random_model_is_built_once_and_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = materialise(tiny_model("llama"), tmp_path, True)
    assert folder.is_relative_to(cache_dir())
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert materialise(tiny_model("llama"), tmp_path, True) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path))
    torch.rand(3)  # global random state is neither used nor moved
    state = torch.get_rng_state()
    elsewhere = materialise(tiny_model("llama"), tmp_path, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (elsewhere / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list(elsewhere.parent.glob(".*")), "nothing half made is left"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (PathSource(kind="path", path="/nowhere"), "/nowhere is not a folder"),
        (NamedSource(kind="named", name="teacher"), "models/teacher is not a folder"),
        (GgufSource(kind="gguf", file="x.gguf", package="no-such-package"), "no-such-package is not installed"),
        (GgufSource(kind="gguf", file="x.gguf", package="numpy"), "has no file x.gguf"),
        (GgufSource(kind="gguf", file="/nowhere/x.gguf"), "no GGUF file at /nowhere/x.gguf"),
        (HubSource(kind="hub", repo="nobody/nothing", revision="0" * 40), "offline"),
    ],
)
def test_a_missing_source_is_told(source: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match=told) as raised:
        materialise(_with_source(source), tmp_path, True)
    assert "tiny-llama" in str(raised.value)


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = materialise(tiny_model("llama"), tmp_path, True)
    assert materialise(_with_source(PathSource(kind="path", path=str(folder))), tmp_path, True) == folder
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "teacher").symlink_to(folder)
    assert materialise(_with_source(NamedSource(kind="named", name="teacher")), tmp_path, True) == tmp_path / "models" / "teacher"
    unsafe = tmp_path / "unsafe"
    unsafe.mkdir()
    (unsafe / "config.json").write_text("{}")
    (unsafe / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceMissing, match="no safetensors weights"):
        materialise(_with_source(PathSource(kind="path", path=str(unsafe))), tmp_path, True)


def test_a_shape_that_cannot_be_built_is_bad_input(tmp_path: Path) -> None:
    small = Architecture(layers=1, hidden_size=8, intermediate_size=8, heads=1, kv_heads=1, vocabulary=258)
    for shape in (None, small):
        with pytest.raises(BadInput, match="tiny-llama: architecture"):
            materialise(tiny_model("llama").model_copy(update={"architecture": shape}), tmp_path, True)


def test_true_shapes_need_no_memory() -> None:
    shape = Architecture(layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, vocabulary=32000)
    with torch.device("meta"):
        model = build_model("llama", shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_base_is_frozen_and_in_the_asked_format(family: Any) -> None:
    folder = materialise(tiny_model(family), Path("unused"), True)
    ids = torch.arange(60, 70).view(1, -1)
    logits = {}
    for precision, compute in (("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")):
        model = load_base(folder, precision, compute, True, "cpu")  # type: ignore[arg-type]
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with torch.inference_mode():
            logits[precision, compute] = model(input_ids=ids).logits
        assert logits[precision, compute].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    exact = logits["fp32", "fp32"]
    for key, bound in ((("bf16", "bf16"), 0.05), (("nf4", "fp32"), 0.5)):
        gap = (logits[key].float() - exact).abs().max().item()  # type: ignore[index]
        assert 0 < gap < bound * exact.abs().max().item()


def test_dropout_of_the_base_is_off(tmp_path: Path) -> None:
    folder = materialise(tiny_model("gpt_neox"), tmp_path, True)
    dropping = tmp_path / "dropping"
    dropping.mkdir()
    for file in folder.iterdir():
        (dropping / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps({**config, "hidden_dropout": 0.5, "attention_dropout": 0.5}))
    model = load_base(dropping, "fp32", "fp32", True, "cpu").train()
    ids = torch.arange(60, 70).view(1, -1)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_unquantised_weights_and_activations_share_a_format() -> None:
    with pytest.raises(ValueError, match="only nf4"):
        load_base(materialise(tiny_model("llama"), Path("unused"), True), "fp32", "bf16", True, "cpu")


def test_a_missing_pad_token_is_made_up_for(tmp_path: Path) -> None:
    folder = materialise(tiny_model("llama"), tmp_path, True)
    assert load_tokenizer(folder).pad_token == "<pad>"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del told["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    assert load_tokenizer(tmp_path).pad_token == "</s>"


# ---------------------------------------------------------------- LoRA layers


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("llama", "attention", 6),
        ("llama", "all-linear", 14),
        ("llama", ["up_proj", "self_attn.o_proj"], 4),
        ("gpt_neox", "attention", 2),
        ("gpt_neox", "all-linear", 8),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_targets(family: Any, targets: Any, layers: int, precision: str) -> None:
    adapted = attach_lora(_base(family, precision), _settings(targets=targets, alpha="2r"), family, CPU, DropoutContext(0))
    weights = _weights(adapted)
    assert len(weights) == 2 * layers
    assert not any("lm_head" in name or "embed" in name for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert adapted.peft_config["default"].lora_alpha == 8


@pytest.mark.parametrize("targets", [["q_proj", "nonsense"], ["lm_head"], ["embed_tokens"], []])
def test_targets_that_are_no_linear_layers_are_bad_input(targets: list[str]) -> None:
    with pytest.raises(BadInput, match=r"targets.*allowed: attention, all-linear, or a list of: down_proj, "):
        target_modules(_base(), _settings(targets=targets), "llama")


def test_lora_starts_from_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = _weights(attach_lora(_base(), _settings(targets="all-linear"), "llama", CPU, DropoutContext(0)))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = _weights(attach_lora(_base(), _settings(), "llama", CPU, DropoutContext(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(again) < set(first)
    assert all(torch.equal(first[name], weight) for name, weight in again.items())
    other = _weights(attach_lora(_base(), _settings(seed=1), "llama", CPU, DropoutContext(0)))
    for name, weight in first.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound
            assert name not in other or not torch.equal(other[name], weight)
    starts = [weight for name, weight in first.items() if "q_proj.lora_A" in name]
    assert not torch.equal(*starts), "layers differ"


def test_adapters_come_off_without_a_trace() -> None:
    model = _base("gpt_neox")
    ids = torch.arange(60, 70).view(1, -1)
    before, names = model(input_ids=ids).logits, [name for name, _ in model.named_parameters()]
    adapted = attach_lora(model, _settings(dropout=0.5, targets="all-linear"), "gpt_neox", CPU, DropoutContext(0))
    assert sum(isinstance(module, KeyedDropout) for module in adapted.modules()) == 8
    adapted.unload()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names


# ---------------------------------------------------------------- adapter files


def _saved(folder: Path, fill: float = 0.01) -> PeftModel:
    adapted = attach_lora(_base(), _settings(), "llama", CPU, DropoutContext(0))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, fill)
    save_adapter(folder, _weights(adapted), adapted.peft_config["default"], "somebody/model")
    return adapted.eval()


def test_a_saved_adapter_is_peft_s_own_format(tmp_path: Path) -> None:
    adapted = _saved(tmp_path / "a" / "step-000001")
    folder = tmp_path / "a" / "step-000001"
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "checksums.json"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "whoever may read one may read all"
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]
    ids = torch.arange(60, 70).view(1, -1)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(_base(), folder)
        assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/model"
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    told = (folder / "adapter_config.json").read_text()
    assert not any(str(path) in told for path in (tmp_path, cache_dir()))


def test_digest_is_of_content(tmp_path: Path) -> None:
    for name, fill in (("one", 0.1), ("same", 0.1), ("other", 0.2)):
        _saved(tmp_path / name, fill)
    digests = [adapter_digest(tmp_path / name) for name in ("one", "same", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    _saved(folder)
    verify(folder)
    weights = folder / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(AdapterDamaged, match=r"adapter_model\.safetensors: differs"):
        verify(folder)
    weights.unlink()
    with pytest.raises(AdapterDamaged, match=r"adapter_model\.safetensors: missing"):
        verify(folder)
    (folder / "checksums.json").write_text('{"files": {}}')
    with pytest.raises(AdapterDamaged, match="incomplete"):
        verify(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(AdapterDamaged, match=r"checksums\.json: missing"):
        adapter_digest(folder)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted = _saved(folder)
    digest = adapter_digest(folder)
    with pytest.raises(Exception, match="NoneType"):
        save_adapter(folder, {"x": None}, adapted.peft_config["default"], "m")  # type: ignore[dict-item]
    assert adapter_digest(folder) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_name_of_a_base_is_never_a_path() -> None:
    assert base_name(_with_source(HubSource(kind="hub", repo="a/b"))) == "a/b"
    assert base_name(_with_source(PathSource(kind="path", path="/home/someone/model"))) == "tiny-llama"
