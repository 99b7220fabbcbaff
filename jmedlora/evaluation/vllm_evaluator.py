"""Scoring checkpoints through vLLM: the same questions, prompts, rules and files as with the base model in transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch.nn import Linear
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import ModelConfig, Precision
from jmedlora.evaluation.evaluator import CheckpointEvaluator, identity_of
from jmedlora.evaluation.journal import Journal
from jmedlora.evaluation.opening import AdapterDoesNotFit, OpenedAdapter, open_adapter
from jmedlora.evaluation.resident import PROBE_TOKENS, AdapterHasNoEffect, verified
from jmedlora.evaluation.results import Answers, Checkpoint
from jmedlora.evaluation.tasks import Task
from jmedlora.evaluation.vllm_engine import RANKS, VllmEngine
from jmedlora.evaluation.vllm_requests import choose, generate
from jmedlora.models.adapters import save_adapter
from jmedlora.models.load import load_tokenizer
from jmedlora.models.lora import PREFIX
from jmedlora.models.source import materialise
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec


class VllmEvaluator(CheckpointEvaluator):
    """Has a vLLM engine answer, which holds the base model and the adapters of several checkpoints at once."""

    engine = "vllm"
    _spare_tokens = 1  # vLLM generates a token behind whatever it weighs

    def __init__(
        self,
        model: ModelConfig,
        precision: Precision,
        compute_precision: Literal["fp32", "bf16"],
        double_quantisation: bool,
        sources: Path,
        offline: bool,
        adapters_at_once: int = 1,
        gpu_share: float = 1.0,
    ):
        """Prepares the base; it is loaded with the first evaluation.

        adapters_at_once: those that are made room for from the start; more make the engine start again. gpu_share: of one GPU.
        Raises BadInput where vLLM is not installed, or would hold the base in another way.
        """
        if precision == "nf4" and not double_quantisation:
            told = "vllm quantises the constants of NF4 once more, and double_quantisation is false"
            raise BadInput([Fault(f"model {model.name}", "evaluation.engine", told, "transformers")])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = materialise(model, sources, offline)
        self._tokenizer = load_tokenizer(folder)
        self._base = _without_weights(folder)
        self._layers = _inner_layers(self._base)
        positions: int = self._base.config.max_position_embeddings
        self._vllm = VllmEngine(folder, precision, compute_precision, positions, self._layers, gpu_share)
        libraries = {"vllm": self._vllm.vllm.__version__, **{name: version(name) for name in ("torch", "transformers")}}
        super().__init__(identity_of(model, folder, precision, compute_precision, double_quantisation), libraries, sources)
        self._adapters_at_once = adapters_at_once
        self._proven: set[str] = set()
        """Digests of adapters that fit and have an effect."""
        self._asked: list[Any] = []
        """Whose the answers are, one after the other, as the engine names them; None: the bare base's."""
        self._plain = tempfile.TemporaryDirectory(prefix="jmedlora-vllm-")

    def _load(self, together: Sequence[Checkpoint], task: Task, storage: Storage) -> dict[Checkpoint, str | Exception | None]:
        """Makes the checkpoints' adapters known to the engine; those are left out that are damaged, do not fit or change nothing."""
        if not together[0].step:
            self._vllm.start()
            self._asked = [None]
            return {together[0]: None}
        folders = {each: storage.run(each.run_key).checkpoint(each.step) for each in together}
        loaded: dict[Checkpoint, str | Exception | None] = {each: verified(folder) for each, folder in folders.items()}
        opened: dict[Checkpoint, tuple[Path, int]] = {}
        for each, digest in loaded.items():
            if isinstance(digest, str):
                try:
                    opened[each] = self._readable(folders[each], digest)
                except Exception as error:  # whatever is wrong with one file, the others' can be read
                    loaded[each] = error
        requests = self._add(opened, loaded)
        for each in self._without_effect(requests, loaded, task.prompts.token_ids[0]):
            loaded[each] = AdapterHasNoEffect(f"{folders[each]}: the adapter does not change the base model's logits")
            del requests[each]
        self._proven |= {digest for each in requests if isinstance(digest := loaded[each], str)}
        self._asked = list(requests.values())
        return loaded

    def _readable(self, folder: Path, digest: str) -> tuple[Path, int]:
        """A folder from which vLLM reads the adapter for what it is, and its rank. Raises AdapterDoesNotFit, AdapterHasNoEffect.

        vLLM knows one rank and one scale for all layers: an adapter with patterns is written anew, as wide as its widest layer.
        """
        config = LoraConfig.from_pretrained(folder)
        opened = open_adapter(folder, self._base, "cpu")
        if outside := {name.rpartition(".")[2] for name in opened.layers} - self._layers:
            raise AdapterDoesNotFit(f"{folder}: {', '.join(sorted(outside))}: vLLM leaves out what is added there when it weighs prompts")
        if (rank := opened.shape.rank) > RANKS[-1]:
            raise AdapterDoesNotFit(f"{folder}: rank {rank} is more than the {RANKS[-1]} that vLLM takes")
        if not any(all(opened.weights[f"{PREFIX}{name}.lora_{part}.weight"].any() for part in "AB") for name in opened.layers):
            raise AdapterHasNoEffect(f"{folder}: the adapter's weights add nothing")
        if not config.rank_pattern and not config.alpha_pattern:
            return folder, rank
        plain = Path(self._plain.name) / digest
        if not plain.exists():
            written = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=opened.shape.alpha, target_modules=opened.layers)
            save_adapter(plain, _widened(opened, rank), written, self._base.config.model_type)
        return plain, rank

    def _add(self, opened: dict[Checkpoint, tuple[Path, int]], loaded: dict[Checkpoint, str | Exception | None]) -> dict[Checkpoint, Any]:
        """What names the adapters in requests; what vLLM does not take is told in `loaded`."""
        requests: dict[Checkpoint, Any] = {}
        if not opened:
            return requests
        try:
            self._vllm.start(max(rank for _, rank in opened.values()), max(len(opened), self._adapters_at_once))
        except AdapterDoesNotFit as refused:
            loaded |= dict.fromkeys(opened, refused)
            return requests
        for each, (folder, _) in opened.items():
            try:
                requests[each] = self._vllm.add(str(loaded[each]), folder)
            except AdapterDoesNotFit as refused:
                loaded[each] = refused
        return requests

    def _without_effect(
        self, requests: dict[Checkpoint, Any], loaded: dict[Checkpoint, str | Exception | None], prompt: list[int]
    ) -> list[Checkpoint]:
        """Those of the new adapters with which the end of a prompt is exactly as likely as with the base: vLLM leaves out what it
        has no layer for without a word."""
        new = [each for each in requests if loaded[each] not in self._proven]
        if not new:
            return []
        params = self._vllm.vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=0, detokenize=False)
        # as many of the base, so that sums are rounded alike, and apart: vLLM's CPU backend gives rows without adapter that of the
        # last place where others of the batch have one
        asked = ([None] * len(new), [requests[each] for each in new])
        prompts = [prompt[-PROBE_TOKENS:]] * len(new)
        bare, adapted = ([_likelihoods(output) for output in self._vllm.ask(prompts, [params] * len(new), own)] for own in asked)
        return [each for each, *pair in zip(new, bare, adapted, strict=True) if pair[0] == pair[1]]

    def _answers(
        self, task: Task, evaluation: EvaluationSpec, journals: Sequence[Journal], on_batch: Callable[[int], None] | None
    ) -> list[tuple[Answers, int]]:
        """The answers of each adapter, and the tokens that were generated or weighed."""
        if evaluation.scoring == "loglikelihood":
            weighed = choose(self._vllm, self._asked, task.prompts.token_ids, task.choices, journals, on_batch)
            return [(Answers([], own), sum(sum(each.tokens) for each in own)) for own in weighed]
        marker = evaluation.prompt.answer_marker
        asked = (self._asked, task.prompts.token_ids, evaluation.max_new_tokens, journals, on_batch, marker)
        return [(Answers(texts, []), tokens) for texts, tokens in generate(self._vllm, self._base, self._tokenizer, *asked)]


def _without_weights(folder: Path) -> PreTrainedModel:
    """A model of names and shapes alone, with what its folder says of generation."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _inner_layers(model: PreTrainedModel) -> set[str]:
    """The last parts of the names of all linear layers but the output layer.

    With adapters to that, vLLM 0.30 to 0.33 miscalculate the likelihoods of prompts, if only in what they add there.
    """
    output = model.get_output_embeddings()
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear) and module is not output}


def _widened(opened: OpenedAdapter, rank: int) -> dict[str, torch.Tensor]:
    """An adapter's weights with zeros for the ranks that a layer has less than the widest."""
    wide = {}
    for name, weight in opened.weights.items():
        is_a = name.endswith("lora_A.weight")
        missing = rank - weight.shape[0 if is_a else 1]
        wide[name] = pad(weight, (0, 0, 0, missing) if is_a else (0, missing))
    return wide


def _likelihoods(output: Any) -> list[float]:
    """Log-probabilities of the tokens that a request was given (but the first), and of those it generated."""
    told = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    tokens = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    return [position[token].logprob for position, token in zip(told, tokens, strict=True)]
