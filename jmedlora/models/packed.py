"""Low-rank products of many adapters at once: one linear layer of the base model, and what a pack of adapters adds to it.

The weights of N adapters lie in one tensor (N, R, W): R is the widest adapter's rank, and a row holds what all layers have of one rank,
A's row and B's column of each. A narrower adapter is the beginning of its part, and the rest is zero. So an adapter is one vector:
one parameter, one gradient, one step, however many layers it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    weights: Tensor
    """(N, R, W): of all adapters and layers."""
    dropout: KeyedDropout | None = None
    layout: Layout | None = None
    anchor: Tensor | None = None
    """A scalar that stands for the adapters' parameters in autograd's graph; None where they are not trained."""
    gradients: Tensor | None = None
    """(N, R, W): of the backward at hand, as far as it has come."""

    def known_layout(self) -> Layout:
        """The layout of the batch at hand."""
        if self.layout is None:
            raise RuntimeError("a packed layer was called before its pack was told which rows belong to which adapter")
        return self.layout

    def enter(self, adapters: Sequence[RowsOfAdapter]) -> None:
        """Sets the rows of each adapter, in the order of the batch."""
        self.layout = Layout([len(each.rows) for each in adapters], self.scaling.device)
        if self.dropout is not None:
            self.dropout.enter(adapters)

    def room_for_gradients(self) -> Tensor:
        """(N, R, W), zero where nothing was put yet."""
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.weights)
        return self.gradients


class PackedLinear(nn.Module):
    """A frozen linear layer with the low-rank layers of N adapters beside it.

    Input (B, T, in), whose rows belong to the adapters as the batch's layout says. All adapters have the widest one's rank R
    here; what a narrower one does not use is zero, and stays so: its gradients are products with zeros.
    """

    def __init__(self, base_layer: nn.Linear, place: int, start: int, batch: Batch):
        """place: of this layer among the pack's, for its dropout. start: of its values in a row of the pack's weights."""
        super().__init__()
        self.base_layer = base_layer
        self._batch = batch
        self._place = place
        middle = start + base_layer.in_features
        self._down, self._up = slice(start, middle), slice(middle, middle + base_layer.out_features)
        self.train(base_layer.training)

    def down(self, weights: Tensor) -> Tensor:
        """This layer's part of (..., W): the A of adapters, (..., in)."""
        return weights[..., self._down]

    def up(self, weights: Tensor) -> Tensor:
        """Likewise B, transposed: (..., out)."""
        return weights[..., self._up]

    def forward(self, rows: Tensor) -> Tensor:
        out = self.base_layer(rows)
        dropout = self._batch.dropout
        masks = None
        if dropout is not None and self.training:
            masks = dropout.masks(self._place, rows.shape[1], rows.shape[2], rows.dtype)
        if masks is None and not torch.is_grad_enabled():
            return self._added(out, rows)
        return _LowRank.apply(out, rows, masks, self, self._batch, self._batch.anchor)

    def _added(self, out: Tensor, rows: Tensor) -> Tensor:
        """The same as below, for an `out` that nobody else has, and without gradients."""
        layout, weights = self._batch.known_layout(), self._batch.weights
        narrow = torch.bmm(layout.group(rows), self.down(weights).transpose(1, 2)).mul_(self._batch.scaling.to(rows.dtype))
        if layout.places is None:
            return out.view(layout.adapters, -1, out.shape[-1]).baddbmm_(narrow, self.up(weights)).view(out.shape)
        return out.add_(layout.ungroup(torch.bmm(narrow, self.up(weights)), rows.shape[1]))


class _LowRank(torch.autograd.Function):
    """out + scaling * B (A dropout(rows)), for the rows of every adapter.

    Gradients of the weights are put where the pack collects them; the anchor gets none, but its turn comes after all layers'.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, rows: Tensor, masks: Masks | None, layer: PackedLinear, batch: Batch, anchor: Tensor | None
    ) -> Tensor:
        layout, weights = batch.known_layout(), batch.weights
        dropped = rows if masks is None else masks.apply(rows)
        narrow = torch.bmm(layout.group(dropped), layer.down(weights).transpose(1, 2)).mul_(batch.scaling.to(rows.dtype))
        ctx.save_for_backward(dropped, narrow, *(masks or ()))
        ctx.layer, ctx.batch, ctx.layout = layer, batch, layout
        ctx.is_trained = anchor is not None
        if layout.places is None:
            return torch.baddbmm(out.view(layout.adapters, -1, out.shape[-1]), narrow, layer.up(weights)).view(out.shape)
        return out + layout.ungroup(torch.bmm(narrow, layer.up(weights)), rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dropped, narrow, *masks = ctx.saved_tensors
        layer, batch, layout = ctx.layer, ctx.batch, ctx.layout
        (gradient,) = gradients
        above = layout.group(gradient)
        of_narrow = torch.bmm(above, layer.up(batch.weights).transpose(1, 2)).mul_(batch.scaling.to(above.dtype))
        if ctx.is_trained:
            room = batch.room_for_gradients()
            torch.bmm(narrow.transpose(1, 2), above, out=layer.up(room))
            torch.bmm(of_narrow.transpose(1, 2), layout.group(dropped), out=layer.down(room))
        of_rows = None
        if ctx.needs_input_grad[1]:
            of_rows = layout.ungroup(torch.bmm(of_narrow, layer.down(batch.weights)), dropped.shape[1])
            if masks:
                of_rows = Masks(*masks).apply(of_rows)
        return gradient, of_rows, None, None, None, None
