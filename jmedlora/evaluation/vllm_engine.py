"""vLLM in this process: an engine for one base model and so many adapters at once, asked with token ids.

Written against the sources of vLLM 0.30.0 and vllm-bnb-plugin 0.0.3. vLLM is imported when an engine is made, and nowhere else.
"""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from jmedlora.config.faults import BadInput, Fault, first_line, is_out_of_memory
from jmedlora.config.parts import Precision
from jmedlora.evaluation.opening import AdapterDoesNotFit
from jmedlora.plan.checks import VLLM_MAX_RANK

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, VLLM_MAX_RANK)
"""What vLLM takes as `max_lora_rank`."""
MEMORY_SHARE = 0.9
"""Of a GPU, for weights, adapters and cache: what is left takes the logits of prompts that are weighed."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ENVIRONMENT = {
    # in this process: its memory goes with it however it ends, and what vLLM says of an adapter arrives as it is
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # which would tell vLLM's makers about this machine
    "VLLM_NO_USAGE_STATS": "1",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING"}


def import_vllm() -> ModuleType:
    """The package, set up for an engine in this process that reports to nobody. Raises BadInput where it is not installed."""
    os.environ |= _ENVIRONMENT
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
        _ = vllm.LLM  # what it is made of is imported with its first use
    except (ImportError, OSError) as error:
        told = f"vllm, but vLLM cannot be imported here ({first_line(error)})"
        raise BadInput([Fault("resources", "evaluation.engine", told, "pip install 'jmedlora[vllm]', or transformers")]) from None
    return vllm


class VllmEngine:
    """Starts vLLM as it is needed: without adapters, with as many places of a rank as are asked for, and again once they are outgrown."""

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        compute_precision: Literal["fp32", "bf16"],
        positions: int,
        layers: Collection[str],
        gpu_share: float = 1.0,
    ):
        """folder: the base model's. positions: the most tokens of a prompt with its answer. layers: last parts of the names of those
        that adapters may change. gpu_share: of one GPU, that is ours.

        Raises BadInput where vLLM is not installed.
        """
        self.vllm = import_vllm()
        self._lora = importlib.import_module("vllm.lora.request")
        self._settings = {
            "model": str(folder),
            "dtype": _DTYPES[compute_precision],
            # our NF4 is bitsandbytes', and so is the plugin's: blocks of 64, constants quantised once more
            **({"quantization": "bitsandbytes"} if precision == "nf4" else {"load_format": "safetensors"}),
            "max_model_len": positions,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": MEMORY_SHARE * gpu_share,
            "generation_config": "vllm",  # and not the model's, whose sampling and penalties play no part
            "trust_remote_code": False,
            "seed": 0,
        }
        self._adapters = {"enable_lora": True, "lora_target_modules": sorted(layers)}
        self.rank = 0
        """The widest adapter that the running engine takes; 0 where it takes none."""
        self.places = 0
        """Adapters that the running engine has room for."""
        self._running: list[Any] = []
        self._numbers: dict[str, int] = {}
        self._finalizer = weakref.finalize(self, _end, self._running)

    def start(self, rank: int = 0, adapters: int = 0) -> None:
        """Has an engine run that takes so many adapters of so high a rank (of RANKS, or less) at once; starts another where none does.

        Raises AdapterDoesNotFit for a model to which vLLM takes no adapters.
        """
        if self._running and rank <= self.rank and adapters <= self.places:
            return
        rank, adapters = max(rank, self.rank), max(adapters, self.places)
        settings = dict(self._settings)
        if adapters:
            rank = next(allowed for allowed in RANKS if rank <= allowed)
            settings |= {**self._adapters, "max_loras": adapters, "max_lora_rank": rank}
        self.stop()
        try:
            self._running.append(self.vllm.LLM(**settings))
        except Exception as error:
            _free()
            if adapters and _is_about_adapters(error):
                raise AdapterDoesNotFit(f"vLLM: {first_line(error)}") from None
            raise
        self.rank, self.places = rank, adapters

    def stop(self) -> None:
        """Ends the running engine and gives back its memory."""
        self.rank = self.places = 0
        _end(self._running)

    def add(self, digest: str, folder: Path) -> Any:
        """Loads an adapter; returns what names it in requests. Raises AdapterDoesNotFit with what vLLM says of it."""
        number = self._numbers.setdefault(digest, len(self._numbers) + 1)
        request = self._lora.LoRARequest(lora_name=digest, lora_int_id=number, lora_path=str(folder))
        try:
            self._running[0].llm_engine.add_lora(request)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise AdapterDoesNotFit(f"{folder}: vLLM: {' '.join(str(error).split())}") from None
        return request

    def ask(self, prompts: Sequence[list[int]], params: Sequence[Any], adapters: Sequence[Any]) -> list[Any]:
        """vLLM's outputs for prompts in token ids, in their order. adapters: whose each is, as `add` named them; None: the base's.

        An engine that fails, or is interrupted, has ended.
        """
        try:
            outputs: list[Any] = self._running[0].generate(
                [self.vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts], list(params), lora_request=list(adapters), use_tqdm=False
            )
        except BaseException:  # what was begun would be among the next answers
            self.stop()
            raise
        return outputs


def _is_about_adapters(error: Exception) -> bool:
    """Whether an engine did not start since the model takes no adapters, by what vLLM says then."""
    told = str(error)
    return "support LoRA" in told or "LoRA is not supported" in told or "LoRA modules" in told


def _end(running: list[Any]) -> None:
    while running:
        running.pop().llm_engine.engine_core.shutdown()
        _free()


def _free() -> None:
    gc.collect()  # an engine's parts hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
