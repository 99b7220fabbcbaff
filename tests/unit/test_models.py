"""Sources, loading, LoRA layers and adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from jmedlora.config.faults import BadInput
from jmedlora.config.locate import cache_dir
from jmedlora.config.parts import Architecture, GgufSource, HubSource, ModelConfig, NamedSource, PathSource
from jmedlora.config.run import RunSettings
from jmedlora.models.adapters import base_name, save_adapter
from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.lora import AdapterPack, Shape, TrainedWeights, initial, lora_config, target_modules
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


def _pack(model: PreTrainedModel, *settings: RunSettings, family: Any = "llama") -> AdapterPack:
    """Fresh adapters, a row for each."""
    pack = AdapterPack(model, target_modules(model, settings[0], family), [Shape.of(each) for each in settings], CPU)
    for adapter, each in enumerate(settings):
        pack.fill(adapter, pack.fresh(adapter, each.seed))
    pack.enter([RowsOfAdapter([0], 1) for _ in settings])
    return pack


def _weights(pack: AdapterPack, adapter: int = 0) -> dict[str, Tensor]:
    """Copies of an adapter's weights, at its own rank."""
    return {name: weight.clone() for name, weight in pack.parts(adapter).items()}


def _bits(model: PreTrainedModel) -> dict[str, bytes]:
    return {name: bytes(weight.flatten().view(torch.uint8)) for name, weight in model.state_dict().items() if isinstance(weight, Tensor)}


@torch.inference_mode()
def _logits(model: Any, rows: int = 1) -> Tensor:
    logits: Tensor = model(input_ids=torch.arange(60, 70).repeat(rows, 1)).logits
    return logits


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
    settings = _settings(targets=targets, alpha="2r")
    weights = _weights(_pack(_base(family, precision), settings, family=family))
    assert len(weights) == 2 * layers
    assert not any("lm_head" in name or "embed" in name for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    model = _base(family, precision)
    config = lora_config(settings, target_modules(model, settings, family))
    assert config.lora_alpha == 8
    plain = get_peft_model_state_dict(get_peft_model(model, config))
    assert {name: weight.shape for name, weight in weights.items()} == {name: weight.shape for name, weight in plain.items()}


@pytest.mark.parametrize("targets", [["q_proj", "nonsense"], ["lm_head"], ["embed_tokens"], []])
def test_targets_that_are_no_linear_layers_are_bad_input(targets: list[str]) -> None:
    with pytest.raises(BadInput, match=r"targets.*allowed: attention, all-linear, or a list of: down_proj, "):
        target_modules(_base(), _settings(targets=targets), "llama")


def test_a_start_is_fixed_for_all_time() -> None:
    # Written down on purpose: another start would make another adapter under the same run key.
    found = initial("base_model.model.model.layers.0.self_attn.q_proj", rank=2, width=3, seed=1)
    torch.testing.assert_close(found, torch.tensor([[-0.1367, 0.5600, 0.1938], [0.2587, 0.5135, -0.1961]]), rtol=0, atol=6e-5)


def test_lora_starts_from_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = _weights(_pack(_base(), _settings(targets="all-linear")))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = _weights(_pack(_base(), _settings()))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(again) < set(first)
    assert all(torch.equal(first[name], weight) for name, weight in again.items())
    other = _weights(_pack(_base(), _settings(seed=1)))
    for name, weight in first.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound
            assert name not in other or not torch.equal(other[name], weight)
    starts = [weight for name, weight in first.items() if "q_proj.lora_A" in name]
    assert not torch.equal(*starts), "layers differ"


def test_in_a_pack_each_starts_as_it_does_alone() -> None:
    settings = [_settings(rank=rank, seed=seed) for rank, seed in ((4, 0), (1, 1), (8, 0))]
    pack = _pack(_base(), *settings)
    assert pack.rank == 8 and len(pack) == 3
    for adapter, each in enumerate(settings):
        alone = _weights(_pack(_base(), each))
        for name, weight in _weights(pack, adapter).items():
            assert torch.equal(weight, alone[name])
            assert weight.shape[0 if "lora_A" in name else 1] == each.rank
        whole = pack.batch.weights[adapter]
        assert whole.shape[0] == 8 and not whole[each.rank :].any()


def test_weights_are_given_at_an_adapter_s_own_rank() -> None:
    pack = _pack(_base(), _settings(rank=2), _settings(rank=8))
    others = _weights(pack, 1)
    given = {name: torch.randn_like(weight) for name, weight in _weights(pack).items()}
    pack.fill(0, given)
    for name, weight in _weights(pack).items():
        assert torch.equal(weight, given[name])
    assert not pack.batch.weights[0, 2:].any(), "the rest is zero"
    assert all(torch.equal(weight, others[name]) for name, weight in _weights(pack, 1).items())
    narrower = {name: weight[:1] if "lora_A" in name else weight[:, :1] for name, weight in given.items()}
    pack.fill(0, narrower)
    assert not pack.batch.weights[0, 1:].any(), "less than its rank is filled up with zeros"


def test_weights_of_another_adapter_are_refused() -> None:
    pack = _pack(_base(), _settings(rank=2))
    weights = _weights(pack)
    (first, *_), last = weights, list(weights)[-1]
    with pytest.raises(KeyError, match=first):
        pack.fill(0, {name: weight for name, weight in weights.items() if name != first})
    with pytest.raises(KeyError, match="nonsense"):
        pack.fill(0, weights | {"nonsense": weights[first]})
    for name, shape in ((first, (3, 32)), (first, (2, 31)), (first, (2, 1)), (last, (32, 3)), (last, (1, 2))):
        with pytest.raises(ValueError, match=name):
            pack.fill(0, weights | {name: torch.ones(shape)})


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_adapters_come_off_without_a_trace(precision: str) -> None:
    model = _base("gpt_neox", precision)
    before = _logits(model)
    modules, names = dict(model.named_modules()), [name for name, _ in model.named_parameters()]
    bits = _bits(model)
    settings = [_settings(dropout=0.5, targets="all-linear", rank=rank) for rank in (4, 2)]
    pack = _pack(model, *settings, family="gpt_neox")
    for adapter in range(2):
        pack.fill(adapter, {name: torch.ones_like(weight) for name, weight in _weights(pack, adapter).items()})
    assert not torch.equal(_logits(model, rows=2)[:1], before)
    pack.detach()
    assert torch.equal(_logits(model), before)
    assert dict(model.named_modules()) == modules
    assert [name for name, _ in model.named_parameters()] == names
    assert _bits(model) == bits
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_adapters_are_trainable() -> None:
    model = _base()
    pack = _pack(model, _settings(rank=4), _settings(rank=2))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    parameters = list(TrainedWeights(pack).parameters())
    assert [weight.numel() for weight in parameters] == [4 * pack.width, 2 * pack.width]
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in parameters)


# ---------------------------------------------------------------- adapter files


def _saved(folder: Path, fill: float = 0.01, precision: Any = "fp32") -> AdapterPack:
    """An adapter that is written, still in its base and the second of two."""
    settings = [_settings(rank=rank, alpha=alpha) for rank, alpha in ((8, 16), (4, 2.5))]
    pack = _pack(_base(precision=precision), *settings)
    pack.fill(1, {name: torch.full_like(weight, fill) if "lora_B" in name else weight for name, weight in _weights(pack, 1).items()})
    save_adapter(folder, _weights(pack, 1), lora_config(settings[1], ["v_proj", "q_proj", "k_proj"]), "somebody/model")
    return pack


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_saved_adapter_is_peft_s_own_format(precision: str, tmp_path: Path) -> None:
    """And PEFT's layers give the same logits with it, within rounding: they sum rank by rank what is summed with zeros here."""
    folder = tmp_path / "a" / "step-000001"
    pack = _saved(folder, precision=precision)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "checksums.json"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "whoever may read one may read all"
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]
    both = _logits(pack.model, rows=2)
    loaded = PeftModel.from_pretrained(_base(precision=precision), folder)
    torch.testing.assert_close(_logits(loaded), both[1:], rtol=0, atol=2e-6)
    base = _logits(_base(precision=precision))
    assert (both[1:] - base).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(both[:1], base, rtol=0, atol=2e-6)  # the first has just been started
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/model"
    assert (config["r"], config["lora_alpha"]) == (4, 2.5)
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
    _saved(folder)
    digest = adapter_digest(folder)
    with pytest.raises(Exception, match="NoneType"):
        save_adapter(folder, {"x": None}, lora_config(_settings(), ["q_proj"]), "m")  # type: ignore[dict-item]
    assert adapter_digest(folder) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_name_of_a_base_is_never_a_path() -> None:
    assert base_name(_with_source(HubSource(kind="hub", repo="a/b"))) == "a/b"
    assert base_name(_with_source(PathSource(kind="path", path="/home/someone/model"))) == "tiny-llama"
