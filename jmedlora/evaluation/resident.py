"""A base model with the adapters that are in it: which they are, and which rows of a batch are whose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from jmedlora.evaluation.opening import OpenedAdapter, open_adapter
from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.lora import AdapterPack
from jmedlora.plan.checksums import AdapterDamaged, adapter_digest, verify

# Enough of a prompt to tell whether an adapter changes anything; what is examined costs a pass for each adapter.
PROBE_TOKENS = 64


class AdapterHasNoEffect(Exception):
    """The adapter does not change the base model's logits: scoring it would score the base under another name."""


class Resident:
    """The bare base, which answers as one, or a pack of adapters to it, each of which answers for itself."""

    def __init__(self, model: PreTrainedModel, device: torch.device | str):
        """The bare base."""
        self.model = model
        self.device = device
        self.pack: AdapterPack | None = None
        self._digests: list[str | Exception] = []

    def __len__(self) -> int:
        """How many answer."""
        return 1 if self.pack is None else len(self.pack)

    def enter(self, adapters: Sequence[int]) -> None:
        """Says whose each row of the next forward passes is, until the next call; rows are ordered by adapter."""
        if self.pack is not None:
            counts = [0] * len(self.pack)
            for adapter in adapters:
                counts[adapter] += 1
            self.pack.enter([RowsOfAdapter(range(count)) for count in counts])

    def load(self, folders: Sequence[Path], prompt: list[int]) -> list[str | Exception]:
        """Puts adapters into the base unless just they are there: of each its digest, or what keeps it out, and no other.

        Those are put in which are what their checksums say (else AdapterDamaged), fit (AdapterDoesNotFit), and change the logits
        of the end of `prompt` (AdapterHasNoEffect).
        """
        outcomes = [verified(folder) for folder in folders]
        if outcomes and outcomes == self._digests:
            return outcomes
        self.unload()
        opened: dict[int, OpenedAdapter] = {}
        for place, folder in enumerate(folders):
            if isinstance(outcomes[place], str):
                try:
                    opened[place] = open_adapter(folder, self.model, self.device)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever is wrong with one file, the others' can be read
                    outcomes[place] = error
        try:
            for place in self._attach(opened, prompt):
                outcomes[place] = AdapterHasNoEffect(f"{folders[place]}: the adapter does not change the base model's logits")
        except BaseException:
            # Whatever went wrong, the next adapters must find the base as it was.
            self.unload()
            raise
        self._digests = [outcome for outcome in outcomes if isinstance(outcome, str)]
        return outcomes

    def _attach(self, opened: dict[int, OpenedAdapter], prompt: list[int]) -> list[int]:
        """Puts the adapters in that have an effect, and tells the others."""
        if not opened:
            return []
        before = self._logits(prompt)
        self._put(list(opened.values()))
        idle = [place for number, place in enumerate(opened) if torch.equal(before, self._logits(prompt, number))]
        if idle:
            self.unload()
            if effective := [adapter for place, adapter in opened.items() if place not in idle]:
                self._put(effective)
        return idle

    def _put(self, adapters: Sequence[OpenedAdapter]) -> None:
        """Puts adapters beside the base's layers; a layer that one does not change gets zeros from it."""
        layers = sorted({name for adapter in adapters for name in adapter.layers})
        shapes = [adapter.shape for adapter in adapters]
        pack = self.pack = AdapterPack(self.model, layers, shapes, torch.device(self.device))
        for number, adapter in enumerate(adapters):
            pack.fill(number, {**pack.parts(number), **adapter.weights})

    def unload(self) -> None:
        """Takes the adapters' layers out again: what is left is the base as it was loaded."""
        if self.pack is not None:
            self.pack.detach()
        self.pack, self._digests = None, []

    @torch.inference_mode()
    def _logits(self, prompt: list[int], adapter: int = 0) -> torch.Tensor:
        self.enter([adapter])
        logits: torch.Tensor = self.model(input_ids=torch.tensor([prompt[-PROBE_TOKENS:]], device=self.device), use_cache=False).logits
        return logits


def verified(folder: Path) -> str | Exception:
    """The digest of an adapter that is what its checksums say."""
    try:
        verify(folder)
        return adapter_digest(folder)
    except AdapterDamaged as error:
        return error
