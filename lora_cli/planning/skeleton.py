"""A base model without its weights: configuration, tokenizer, and its modules on the device meta."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.attach import attach, leave_out
from lora_cli.adapters.reach import kind_of, unreached
from lora_cli.adapters.targets import block_lists, find_targets
from lora_cli.base.bounds import require_modest_config
from lora_cli.base.load import build, load_tokenizer, model_config, require_weights_fit, skeleton_of
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import require_trainable, stored_quantization
from lora_cli.base.text import positions, text_config
from lora_cli.base.trials import ordinary_tokens, require_causal, require_no_leak
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached

# Configuration and tokenizer. The weights of a hub model stay there until it is trained.
_LIGHT = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_HEAVY = ["*.safetensors", "original/*", "onnx/*", "openvino/*", "*.bin", "*.pth", "*.gguf"]
_TRIED_PARAMETERS = 300_000_000  # of the largest model of one block of each kind that is made to be tried


@dataclass(frozen=True)
class BaseModel:
    """A causal language model without its weights. skeleton: its modules on the device meta.

    stored: how the checkpoint is quantized already; None as a rule.
    """

    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    config: Any
    skeleton: Any
    stored: str | None
    trust_remote_code: bool

    @property
    def positions(self) -> int | None:
        """The longest example that the model can see, in tokens."""
        return positions(self.config)

    @property
    def packs(self) -> bool:
        """Whether examples can share a row, tried on one random block of each kind; training tries it on the model."""
        return self.packing_refused is None

    @cached_property
    def packing_refused(self) -> LoraError | None:
        """What training would say of packed rows; None where it packs, or cannot be tried without the weights."""
        return self._tried(require_no_leak)

    def require_causal(self) -> None:
        """Raises LoraError, as training does, if a token sees those after it."""
        refused = self._tried(require_causal)
        if refused is not None:
            raise refused

    def unreached_kinds(self, target_modules: str | list[str]) -> set[str]:
        """Kinds of layers that no gradient of text reaches, by `adapters.reach`; none where it cannot be tried."""
        model = self._sample
        if model is None:
            return set()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for parameter in model.parameters():  # what begins at zero would stop gradients that real weights let pass
                if not parameter.any():
                    parameter.normal_(0, 0.02)
        ids = ordinary_tokens(model, min(64, self.positions or 64), 0)

        def backward() -> None:
            logits = model(input_ids=ids[None], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).backward()

        try:
            layers = attach(model, find_targets(model, target_modules, rank=1, alpha=1))
        except LoraError:  # names of layers that the small model lacks
            return set()
        try:
            return {kind_of(name) for name in unreached(model, layers, backward, name=type(self.skeleton).__name__)}
        finally:
            leave_out(model, layers)

    def _tried(self, trial: Callable[..., None]) -> LoraError | None:
        if self._sample is None:
            return None
        try:
            trial(self._sample, torch.device("cpu"), name=type(self.skeleton).__name__)
        except LoraError as error:
            return error
        return None

    @cached_property
    def _sample(self) -> Any:
        """The language model with random weights and one block of each kind; None where that cannot be made."""
        text = text_config(self.config)
        for config in (_cut(text), text):
            is_whole = config is text
            try:
                with torch.device("meta"):
                    made = build(config, self.trust_remote_code)
                    parameters = sum(each.numel() for each in (*made.parameters(), *made.buffers()))
                if parameters > _TRIED_PARAMETERS:
                    continue
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = build(config, self.trust_remote_code).eval()
                if not block_lists(model):
                    continue
                if not is_whole:
                    with torch.no_grad():
                        model(input_ids=torch.arange(8)[None], use_cache=False)
                return model
            except Exception:  # what a cut configuration makes of code that is not ours
                continue
        return None


def _cut(config: Any) -> Any:
    """The configuration of a small model: one block of each kind, few tokens, few experts."""
    small = copy.deepcopy(config)
    kinds = getattr(small, "layer_types", None)
    try:
        if kinds:
            small.layer_types = list(dict.fromkeys(kinds))
        small.num_hidden_layers = len(small.layer_types) if kinds else 1
        small.vocab_size = min(small.vocab_size, 64)
        small.pad_token_id = small.bos_token_id = small.eos_token_id = None
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(small, name, None):
                setattr(small, name, min(getattr(small, name), 8))
    except Exception:  # a configuration that checks what is set, or has no such numbers
        return config
    return small


def look_at_model(name: str, *, trust_remote_code: bool = False) -> BaseModel:
    """Raises LoraError, as training would, if it is missing, not a causal language model, or cannot be trained on."""
    source = _without_weights(name, trust_remote_code)
    require_trainable(source)
    base = base_model(source, trust_remote_code=trust_remote_code)
    base.require_causal()
    return base


def base_model(source: BaseSource, *, trust_remote_code: bool = False) -> BaseModel:
    """Raises LoraError, as loading it would, if it is not a causal language model, or has no usable tokenizer."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = model_config(source, trust_remote_code)
    skeleton = skeleton_of(source, config, trust_remote_code)
    here = source.gguf is not None or any(source.folder.glob("*.safetensors"))
    if here:  # of a model that is on the hub, its weights may still be there
        require_weights_fit(source, config, skeleton)
    stored = stored_quantization(source) or ("none" if source.gguf is not None else None)
    return BaseModel(source, tokenizer, config, skeleton, stored, trust_remote_code)


def _without_weights(name: str, trust_remote_code: bool) -> BaseSource:
    """As find_base, but the weights of a hub model are only looked for, not downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    if not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") < 2:
        wanted = [*_LIGHT, "*.py"] if trust_remote_code else _LIGHT
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HEAVY))
            source = BaseSource(name, folder, revision=folder.name)
            require_modest_config(source.config, folder / "config.json")
            weights = ("model.safetensors", "model.safetensors.index.json")
            if isinstance(source.config, dict) and (
                any((folder / file).exists() for file in weights)
                or HfApi().file_exists(name, weights[0], revision=source.revision)
            ):
                return source
        except LimitReached:
            raise
        except Exception:  # find_base finds it in the cache, or says what is wrong
            pass
    return find_base(name, trust_remote_code=trust_remote_code)
