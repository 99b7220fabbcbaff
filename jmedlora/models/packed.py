"""Low-rank products of many adapters at once: one linear layer of the base model, and what a pack of adapters adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jmedlora.models.dropout import KeyedDropout, Masks, RowsOfAdapter


class Layout:
    """Which rows of a micro-batch belong to which adapter: those of the first adapter come first, and so on."""

    def __init__(self, counts: Sequence[int], device: torch.device):
        self.adapters = len(counts)
        self.most = max(counts)
        self.places: Tensor | None = None
        """Where adapters differ in their number of rows: each row's place among `adapters * most`; the others stay empty."""
        if min(counts) < self.most:
            places = [adapter * self.most + row for adapter, count in enumerate(counts) for row in range(count)]
            self.places = torch.tensor(places, device=device)

    def group(self, rows: Tensor) -> Tensor:
        """(B, T, C) as (adapters, most * T, C), zero where an adapter has no row."""
        _, positions, channels = rows.shape
        if self.places is not None:
            rows = rows.new_zeros(self.adapters * self.most, positions, channels).index_copy_(0, self.places, rows)
        return rows.reshape(self.adapters, self.most * positions, channels)

    def ungroup(self, grouped: Tensor, positions: int) -> Tensor:
        """The inverse."""
        rows = grouped.reshape(self.adapters * self.most, positions, -1)
        return rows if self.places is None else rows.index_select(0, self.places)


@dataclass
class Batch:
    """What all packed layers have to know of the micro-batch at hand; one object, shared by the layers of a pack."""

    scaling: Tensor
    """(N, 1, 1): alpha over rank of each adapter."""
    dropout: KeyedDropout | None = None
    layout: Layout | None = None
    muted: list[int] = field(default_factory=list)
    """Adapters whose loss is not finite: their gradients are zero, whatever is computed."""

    def known_layout(self) -> Layout:
        """The layout of the batch at hand."""
        if self.layout is None:
            raise RuntimeError("a packed layer was called before its pack was told which rows belong to which adapter")
        return self.layout

    def enter(self, adapters: Sequence[RowsOfAdapter]) -> None:
        """Sets the rows of each adapter, in the order of the batch."""
        self.layout = Layout([len(each.rows) for each in adapters], self.scaling.device)
        self.muted = []
        if self.dropout is not None:
            self.dropout.enter(adapters)


class PackedLinear(nn.Module):
    """A frozen linear layer with the low-rank layers of N adapters beside it.

    Input (B, T, in), whose rows belong to the adapters as the batch's layout says. All adapters have the widest one's rank R
    here; what a narrower one does not use is zero, and stays so: its gradients are products with zeros.
    """

    def __init__(self, base_layer: nn.Linear, place: int, adapters: int, rank: int, batch: Batch, device: torch.device, dtype: torch.dtype):
        """place: of this layer among the pack's, for its dropout."""
        super().__init__()
        self.base_layer = base_layer
        self._batch = batch
        self._place = place
        self._down = torch.zeros(adapters, rank, base_layer.in_features, device=device, dtype=dtype)
        self._up = torch.zeros(adapters, base_layer.out_features, rank, device=device, dtype=dtype)
        for adapter in range(adapters):
            self.register_parameter(f"lora_A_{adapter}", nn.Parameter(self._down[adapter]))
            self.register_parameter(f"lora_B_{adapter}", nn.Parameter(self._up[adapter]))
        self._names = [f"lora_A_{adapter}" for adapter in range(adapters)], [f"lora_B_{adapter}" for adapter in range(adapters)]
        self.train(base_layer.training)

    def adapter(self, adapter: int) -> tuple[nn.Parameter, nn.Parameter]:
        """A (R, in) and B (out, R) of one adapter."""
        return getattr(self, f"lora_A_{adapter}"), getattr(self, f"lora_B_{adapter}")

    def cast(self, dtype: torch.dtype) -> None:
        """Turns the weights into another number format, before an optimizer knows them."""
        for kept, names in zip(("_down", "_up"), self._names, strict=True):
            whole = self._stacked(kept, names).to(dtype)
            setattr(self, kept, whole)
            for name, part in zip(names, whole, strict=True):
                getattr(self, name).data = part

    def down(self) -> Tensor:
        """The A of all adapters, (N, R, in), without gradients."""
        return self._stacked("_down", self._names[0])

    def up(self) -> Tensor:
        """The B of all adapters, (N, out, R), without gradients."""
        return self._stacked("_up", self._names[1])

    def _stacked(self, kept: str, names: list[str]) -> Tensor:
        """The tensor that the parameters are parts of, as long as they are: DeepSpeed may put them elsewhere, for good or for a moment."""
        parts = [self._parameters[name] for name in names]
        whole: Tensor | None = getattr(self, kept)
        if whole is not None and parts[-1].data_ptr() == whole[-1].data_ptr() and parts[0].data_ptr() == whole.data_ptr():  # type: ignore[union-attr]
            return whole
        setattr(self, kept, None)
        data = [part.data for part in parts]  # type: ignore[union-attr]
        return data[0].unsqueeze(0) if len(data) == 1 else torch.stack(data)

    def forward(self, rows: Tensor) -> Tensor:
        out = self.base_layer(rows)
        dropout = self._batch.dropout
        masks = None
        if dropout is not None and self.training:
            masks = dropout.masks(self._place, rows.shape[1], rows.shape[2], rows.dtype)
        if masks is None and not torch.is_grad_enabled():
            return self._added(out, rows)
        weights = [self._parameters[name] for names in self._names for name in names]
        return _LowRank.apply(out, rows, masks, self, self._batch, *weights)

    def _added(self, out: Tensor, rows: Tensor) -> Tensor:
        """The same as below, for an `out` that nobody else has, and without gradients."""
        layout = self._batch.known_layout()
        narrow = torch.bmm(layout.group(rows), self.down().transpose(1, 2)).mul_(self._batch.scaling.to(rows.dtype))
        up = self.up().transpose(1, 2)
        if layout.places is None:
            return out.view(layout.adapters, -1, out.shape[-1]).baddbmm_(narrow, up).view(out.shape)
        return out.add_(layout.ungroup(torch.bmm(narrow, up), rows.shape[1]))


class _LowRank(torch.autograd.Function):
    """out + scaling * B (A dropout(rows)), for the rows of every adapter.

    Weights are stacked again in the backward, not kept: where DeepSpeed shards them, they are there only around each layer.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: Tensor, masks: Masks | None, layer: PackedLinear, batch: Batch, *weights: Tensor) -> Tensor:
        layout = batch.known_layout()
        dropped = rows if masks is None else masks.apply(rows)
        narrow = torch.bmm(layout.group(dropped), layer.down().transpose(1, 2)).mul_(batch.scaling.to(rows.dtype))
        ctx.save_for_backward(dropped, narrow, *(masks or ()))
        ctx.layer, ctx.batch, ctx.layout, ctx.has_masks = layer, batch, layout, masks is not None
        up = layer.up().transpose(1, 2)
        if layout.places is None:
            return torch.baddbmm(out.view(layout.adapters, -1, out.shape[-1]), narrow, up).view(out.shape)
        return out + layout.ungroup(torch.bmm(narrow, up), rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dropped, narrow, *masks = ctx.saved_tensors
        layer, batch, layout = ctx.layer, ctx.batch, ctx.layout
        (gradient,) = gradients
        above = layout.group(gradient)
        of_up = torch.bmm(above.transpose(1, 2), narrow)
        of_narrow = torch.bmm(above, layer.up()).mul_(batch.scaling.to(above.dtype))
        of_down = torch.bmm(of_narrow.transpose(1, 2), layout.group(dropped))
        of_rows = None
        if ctx.needs_input_grad[1]:
            of_rows = layout.ungroup(torch.bmm(of_narrow, layer.down()), dropped.shape[1])
            if masks:
                of_rows = Masks(*masks).apply(of_rows)
        for adapter in batch.muted:
            of_down[adapter].zero_()
            of_up[adapter].zero_()
        return gradient, of_rows, None, None, None, *of_down.unbind(0), *of_up.unbind(0)
