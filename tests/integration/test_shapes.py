"""Parameter counts from architecture facts against transformers' own models, on the meta device: no weights are made."""

from __future__ import annotations

import pytest
import torch
import yaml

from jmedlora.config.compose import load_sweep
from jmedlora.config.locate import conf_dir
from jmedlora.models.random_models import build_model
from jmedlora.plan.shapes import linear_layers, model_parameters

PRESETS = sorted((conf_dir() / "model").glob("*.yaml"))
NAMES = [path.stem for path in PRESETS if yaml.safe_load(path.read_text(encoding="utf-8"))["source"]["kind"] != "api"]


@pytest.mark.parametrize("name", NAMES)
def test_a_presets_facts_give_the_parameters_of_the_real_model(name: str) -> None:
    model = load_sweep("smoke", [f"grid.model=[{name}]"]).models[name]
    assert model.architecture is not None
    with torch.device("meta"):
        real = build_model(model.family, model.architecture)
    assert sum(parameter.numel() for parameter in real.parameters()) == model_parameters(model.family, model.architecture)
    linear = {path.rsplit(".", 1)[-1]: module for path, module in real.named_modules() if isinstance(module, torch.nn.Linear)}
    for layer in linear_layers(model.family, model.architecture):
        assert (linear[layer.name].in_features, linear[layer.name].out_features) == (layer.in_features, layer.out_features)
