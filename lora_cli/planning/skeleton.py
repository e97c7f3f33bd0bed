"""A base model without its weights: configuration, tokenizer, and its modules on the device meta."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lora_cli.base.attention import attention_implementation
from lora_cli.base.load import load_tokenizer, model_config, skeleton_of, stored_quantization
from lora_cli.base.source import BaseSource, find_base
from lora_cli.errors import LoraError
from lora_cli.evaluation.packing_check import require_no_leak

# Configuration and tokenizer. The weights of a hub model stay there until it is trained.
_LIGHT = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
_HEAVY = ["*.safetensors", "original/*", "onnx/*", "openvino/*", "*.bin", "*.pth", "*.gguf"]
_TRIED_PARAMETERS = 300_000_000  # of the largest block that is made to see whether examples can share a row


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
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def packs(self) -> bool:
        """Whether examples can share a row, tried on one random block of each kind; training tries it on the model."""
        config = copy.deepcopy(self.config)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = list(dict.fromkeys(kinds))
        config.num_hidden_layers = len(config.layer_types) if kinds else 1
        config.vocab_size = min(config.vocab_size, 64)
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(config, name, None):
                setattr(config, name, min(getattr(config, name), 8))
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in self._made_from(config).parameters())
            if parameters > _TRIED_PARAMETERS:
                return True
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = self._made_from(config)
        except Exception:  # what a cut configuration makes of code that is not ours
            return True
        try:
            require_no_leak(model, torch.device("cpu"))
        except LoraError:
            return False
        return True

    def _made_from(self, config: Any) -> Any:
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention_implementation(config),
            trust_remote_code=self.trust_remote_code,
        )


def look_at_model(name: str, *, trust_remote_code: bool = False) -> BaseModel:
    """Raises LoraError, as loading it would, if it is missing, no causal language model, or has no usable tokenizer."""
    source = _without_weights(name, trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = model_config(source, trust_remote_code)
    skeleton = skeleton_of(source, config, trust_remote_code)
    kind = stored_quantization(source)
    if kind not in (None, "nf4", "int8"):
        raise LoraError(
            f"the checkpoint is already quantized ({kind}), which cannot be trained on",
            where=str(source.folder),
            fix="use the unquantized model",
        )
    return BaseModel(source, tokenizer, config, skeleton, kind, trust_remote_code)


def _without_weights(name: str, trust_remote_code: bool) -> BaseSource:
    """As find_base, but the weights of a hub model are only looked for, not downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    if not Path(name).is_dir() and not name.startswith((".", "/", "~")) and name.count("/") < 2:
        wanted = [*_LIGHT, "*.py"] if trust_remote_code else _LIGHT
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HEAVY))
            source = BaseSource(name, folder, revision=folder.name)
            weights = ("model.safetensors", "model.safetensors.index.json")
            if isinstance(source.config, dict) and (
                any((folder / file).exists() for file in weights)
                or HfApi().file_exists(name, weights[0], revision=source.revision)
            ):
                return source
        except Exception:  # find_base finds it in the cache, or says what is wrong
            pass
    return find_base(name, trust_remote_code=trust_remote_code)
