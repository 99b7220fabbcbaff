"""A stand-in for vLLM 0.30.0, which needs a GPU: the names, arguments and refusals that are used of it, over transformers and PEFT.

Answers and probabilities are computed, one request after the other and with a whole forward pass for every token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = "0.30.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_LAYERS = {"LlamaForCausalLM": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}}
"""By architecture: the names of layers that take adapters."""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.temperature == 0, "only greedy answers are computed here"
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True. Set detokenize=True to use stop.")


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass(frozen=True)
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]


@dataclass
class Seen:
    """What tests look at."""

    started: list[LLM] = field(default_factory=list)
    alive: list[LLM] = field(default_factory=list)
    asked: list[tuple[list[int], SamplingParams, LoRARequest | None]] = field(default_factory=list)
    applies_adapters: bool = True
    """Where false, adapters are loaded and left out without a word, as vLLM does where it has no layer for them."""


class LLM:
    seen: Seen

    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int,
        enable_prefix_caching: bool | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        lora_target_modules: list[str] | None = None,
        generation_config: str = "auto",
        load_format: str = "auto",
    ):
        assert quantization is None and 0 < gpu_memory_utilization <= 1 and not trust_remote_code
        self.seen.started.append(self)
        self.dtype, self.max_model_len = dtype, max_model_len
        self.gpu_memory_utilization = gpu_memory_utilization
        self.enable_lora, self.max_loras, self.max_lora_rank = enable_lora, max_loras, max_lora_rank
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if enable_lora:
            if max_lora_rank not in RANKS:
                raise ValueError(f"max_lora_rank: Input should be one of {RANKS}")
            if type(self.model).__name__ not in LORA_LAYERS:
                raise ValueError(f"{type(self.model).__name__} does not support LoRA yet.")
        self.wraps_output = enable_lora and (lora_target_modules is None or "lm_head" in lora_target_modules)
        self.loaded: dict[int, LoRARequest] = {}
        self.adapted: PeftModel | None = None
        self.llm_engine = SimpleNamespace(add_lora=self._add_lora, engine_core=SimpleNamespace(shutdown=self._shut_down))
        self.seen.alive.append(self)

    def _add_lora(self, request: LoRARequest) -> bool:
        if not self.enable_lora:
            raise RuntimeError("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if request.lora_int_id in self.loaded:
            return True
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        assert not config["rank_pattern"] and not config["alpha_pattern"], "vLLM reads one rank and one scale, and does not tell"
        if config["r"] > self.max_lora_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        with safe_open(str(Path(request.lora_path) / "adapter_model.safetensors"), "pt") as file:
            layers = {name.split(".")[-3] for name in file.keys()}  # noqa: SIM118
        expected = LORA_LAYERS[type(self.model).__name__]
        if unexpected := sorted(layers - expected):
            told = f"expected target modules in {expected} but received {unexpected}."
            raise ValueError(f"While loading {request.lora_path}, {told} Please verify that the loaded LoRA module is correct")
        while len(self.loaded) >= self.max_loras:  # the one that was added first goes
            del self.loaded[next(iter(self.loaded))]
        self.loaded[request.lora_int_id] = request
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, request.lora_path, adapter_name=str(request.lora_int_id))
        else:
            self.adapted.load_adapter(request.lora_path, adapter_name=str(request.lora_int_id))
        self.adapted.eval()
        return True

    def _shut_down(self) -> None:
        self.seen.alive.remove(self)
        del self.model, self.adapted

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: Sequence[LoRARequest | None],
    ) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params) == len(lora_request) and not use_tqdm
        requests = [(prompt["prompt_token_ids"], *rest) for prompt, *rest in zip(prompts, sampling_params, lora_request)]
        for ids, _, adapter in requests:
            if len(ids) >= self.max_model_len:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.max_model_len}.")
            assert adapter is None or self.loaded[adapter.lora_int_id] == adapter
        if self.wraps_output and any(params.prompt_logprobs is not None for _, params, _ in requests):
            raise RuntimeError("einsum(): subscript b has size 5 for operand 1 which does not broadcast with previously seen size 63")
        if any(lora_request) and not all(lora_request):
            raise AssertionError("vLLM's CPU backend would give the bare rows the adapter in the last place")
        self.seen.asked += requests
        with torch.inference_mode():
            return [self._answer(*request) for request in requests]

    def _answer(self, ids: list[int], params: SamplingParams, adapter: LoRARequest | None) -> RequestOutput:
        with self._with(adapter) as model:
            told: list[dict[int, Logprob] | None] | None = None
            if params.prompt_logprobs is not None:
                likely = torch.log_softmax(self._logits(model, ids).float(), -1)
                told = [None, *({token: Logprob(float(likely[place, token]))} for place, token in enumerate(ids[1:]))]
            answer: list[int] = []
            logprobs: list[dict[int, Logprob]] = []
            reason = None
            while reason is None:
                likely = torch.log_softmax(self._logits(model, [*ids, *answer])[-1].float(), -1)
                answer.append(int(likely.argmax()))
                logprobs.append({answer[-1]: Logprob(float(likely.max()))})
                reason = self._finished(len(ids), answer, params)
        return RequestOutput(ids, told, [CompletionOutput(answer, logprobs if params.logprobs is not None else None, reason)])

    def _finished(self, prompt_tokens: int, answer: list[int], params: SamplingParams) -> str | None:
        if answer[-1] in {self.tokenizer.eos_token_id, *(params.stop_token_ids or [])}:
            return "stop"
        text = self.tokenizer.decode(answer, skip_special_tokens=True) if params.stop else ""
        if any(mark in text for mark in params.stop or []):
            return "stop"
        most = self.max_model_len - prompt_tokens
        return "length" if len(answer) >= min(most, most if params.max_tokens is None else params.max_tokens) else None

    @contextmanager
    def _with(self, adapter: LoRARequest | None) -> Iterator[Any]:
        if self.adapted is None:
            yield self.model
            return
        if adapter is not None:
            self.adapted.set_adapter(str(adapter.lora_int_id))
        applied = adapter is not None and self.seen.applies_adapters
        with nullcontext() if applied else self.adapted.disable_adapter():
            yield self.adapted

    @staticmethod
    def _logits(model: Any, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits


def install(patch: pytest.MonkeyPatch) -> Seen:
    """Makes `import vllm` give the stand-in; what is asked of it is seen."""
    vllm, requests = ModuleType("vllm"), ModuleType("vllm.lora.request")
    own = type("LLM", (LLM,), {"seen": Seen()})
    names = {"LLM": own, "SamplingParams": SamplingParams, "TokensPrompt": dict, "__version__": VERSION}
    for name, value in names.items():
        setattr(vllm, name, value)
    requests.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "vllm", vllm)
    patch.setitem(sys.modules, "vllm.lora.request", requests)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        patch.setenv(name, "")  # and as it was afterwards
        patch.delenv(name)
    return own.seen
