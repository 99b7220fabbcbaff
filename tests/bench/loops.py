"""Training loops that others would write: PEFT's own layers, one adapter at a time; and a correct loop over the adapters of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jmedlora.config.run import RunSettings
from jmedlora.models.lora import PREFIX, initial, target_modules
from jmedlora.training.loss import Collated
from tests.plain_lora import PlainLora


def losses_of(model: PreTrainedModel, batch: Collated, adapters: int) -> Tensor:
    """(adapters,): summed cross entropy of labelled tokens, whose logits alone are computed, as ours computes them."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    logits = head(hidden.flatten(0, 1).index_select(0, batch.positions))
    losses = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    return losses.new_zeros(adapters).index_add(0, batch.adapters, losses)


class PlainLoop:
    """One adapter in PEFT's layers, from this project's start; torch's fused AdamW, clipped as HF Trainer clips."""

    def __init__(self, base: PreTrainedModel, settings: RunSettings, all_logits: bool):
        """all_logits: with the model's own loss, which computes the logits of every token; else with this project's."""
        self._plain = PlainLora(base, settings, "llama")
        self._plain.model.train()
        self._settings = settings
        self._all_logits = all_logits
        self._parameters = list(self._plain.weights().values())
        self._optimizer = _adamw([self._parameters], [settings])

    def step(self, batch: Collated) -> float:
        """One optimizer step; its mean loss."""
        if self._all_logits:
            loss = self._plain.model(input_ids=batch.input_ids, labels=_labels(batch), use_cache=False).loss
        else:
            loss = losses_of(self._plain.model.get_base_model(), batch, 1).sum() / len(batch.targets)
        loss.backward()
        if self._settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        """The adapter as PEFT's files name it."""
        return {name: weight.detach().cpu().clone() for name, weight in self._plain.weights().items()}

    def close(self) -> None:
        """Leaves the base as it was."""
        self._plain.model.unload()


class _LoopedLinear(nn.Module):
    """A frozen linear layer, its product taken once for all rows, and a loop over the adapters for what each adds to its own."""

    def __init__(self, base_layer: nn.Linear, name: str, settings: Sequence[RunSettings]):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = [own.alpha_value / own.rank for own in settings]
        device = base_layer.weight.device
        downs = [initial(name, own.rank, base_layer.in_features, own.seed).to(device) for own in settings]
        ups = [torch.zeros(base_layer.out_features, own.rank, device=device) for own in settings]
        self.down, self.up = (nn.ParameterList(nn.Parameter(each) for each in weights) for weights in (downs, ups))

    def forward(self, rows: Tensor) -> Tensor:
        """(B, T, in), of which every adapter has B / N rows, to (B, T, out)."""
        parts = rows.chunk(len(self.scaling))
        added = [
            nn.functional.linear(nn.functional.linear(part, down) * scaling, up)
            for part, down, up, scaling in zip(parts, self.down, self.up, self.scaling, strict=True)
        ]
        return self.base_layer(rows) + torch.cat(added)


class LoopOverAdapters:
    """All adapters at once, each at its own rank, by a Python loop in every linear layer; loss and optimizer are those of ours."""

    def __init__(self, base: PreTrainedModel, settings: Sequence[RunSettings]):
        names = target_modules(base, settings[0], "llama")
        self._base, self._settings = base, settings
        self._layers = {
            name: _LoopedLinear(layer, PREFIX + name, settings)
            for name, layer in list(base.named_modules())
            if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in names
        }
        for name, layer in self._layers.items():
            base.set_submodule(name, layer, strict=True)
        base.train()
        self._groups = [list(self._own(adapter).values()) for adapter in range(len(settings))]
        self._optimizer = _adamw(self._groups, settings)

    def _own(self, adapter: int) -> dict[str, nn.Parameter]:
        found = {}
        for name, layer in self._layers.items():
            found[f"{PREFIX}{name}.lora_A.weight"], found[f"{PREFIX}{name}.lora_B.weight"] = layer.down[adapter], layer.up[adapter]
        return found

    def step(self, batch: Collated) -> list[float]:
        """One optimizer step of each; their mean losses."""
        labelled = len(batch.targets) / len(self._settings)
        losses = losses_of(self._base, batch, len(self._settings)) / labelled
        losses.sum().backward()
        for own, group in zip(self._settings, self._groups, strict=True):
            if own.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(group, own.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return losses.tolist()

    def weights(self) -> list[dict[str, Tensor]]:
        """The adapters as PEFT's files name them."""
        return [
            {name: weight.detach().cpu().clone() for name, weight in self._own(adapter).items()} for adapter in range(len(self._settings))
        ]

    def close(self) -> None:
        """Leaves the base as it was."""
        for name, layer in self._layers.items():
            self._base.set_submodule(name, layer.base_layer, strict=True)
        self._base.eval()


@contextmanager
def looped(base: PreTrainedModel, settings: Sequence[RunSettings]) -> Iterator[LoopOverAdapters]:
    """The adapters in the base, and out of it again."""
    loop = LoopOverAdapters(base, settings)
    try:
        yield loop
    finally:
        loop.close()


@contextmanager
def plain(base: PreTrainedModel, settings: RunSettings, all_logits: bool) -> Iterator[PlainLoop]:
    """The adapter in the base, and out of it again."""
    loop = PlainLoop(base, settings, all_logits)
    try:
        yield loop
    finally:
        loop.close()


def _adamw(groups: Sequence[list[nn.Parameter]], settings: Sequence[RunSettings]) -> torch.optim.AdamW:
    told = [
        {"params": group, "lr": own.learning_rate, "weight_decay": own.weight_decay} for group, own in zip(groups, settings, strict=True)
    ]
    return torch.optim.AdamW(told, fused=True)


def _labels(batch: Collated) -> Tensor:
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.positions + 1] = batch.targets
    return labels.view_as(batch.input_ids)
