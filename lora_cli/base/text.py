"""The language model inside a model: of its configuration, and of its modules.

Many checkpoints are composite: a configuration of text beside ones of pictures and sound, a decoder beside towers
(Gemma 3 from 4B on, Gemma 4, Qwen3.5). All numbers of the language model are read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError

_SENSES = re.compile("vision|image|video|audio|speech|sound")


def text_config(config: Any) -> Any:
    """The configuration of the language model: the whole of it, or the part for text in a composite one."""
    return config.get_text_config(decoder=True)


def vocabulary(config: Any) -> int:
    """How many tokens the language model knows. Raises LoraError where its configuration does not say."""
    size = getattr(text_config(config), "vocab_size", None)
    if size is None:
        raise LoraError(
            f"the configuration of {config.model_type!r} does not say how many tokens it knows (vocab_size)",
            fix="add vocab_size to config.json, or download the model again",
        )
    return size


def positions(config: Any) -> int | None:
    """The longest example that the language model can see, in tokens; None where its configuration does not say."""
    seen = largest(config, "max_position_embeddings") or largest(config, "max_seq_len")  # the second is MPT's
    return seen if isinstance(seen, int) and seen > 0 else None  # XLNet says -1: any number


def largest(config: Any, name: str) -> Any:
    """A number of the configuration; the largest over layers where it may differ by layer. None where it is not set."""
    text = text_config(config)
    if name not in (getattr(text, "per_layer_attributes", None) or ()):
        return getattr(text, name, None)
    stated = [getattr(layer, name, None) for layer in text.per_layer_config]
    return max((value for value in stated if value is not None), default=None)


def hidden_size(model: Any) -> int:
    """Width of what goes from block to block."""
    return largest(model.config, "hidden_size") or model.get_input_embeddings().weight.shape[-1]


def in_language_model(model: Any) -> Callable[[str], bool]:
    """Whether the module of this name computes text; False for those of pictures and sound.

    In a composite model that is the decoder alone. Elsewhere it is all but the towers, recognised by their input: not
    token ids.
    """
    decoder = _decoder(model)
    towers = [] if decoder else _towers(model)
    inside = f"{decoder}." if decoder else ""

    def inside_decoder(name: str) -> bool:
        return name.startswith(inside) and not any(name.startswith(f"{tower}.") for tower in towers)

    return inside_decoder


def left_out(model: Any, linear: Iterable[str]) -> dict[str, int]:
    """How many of the linear layers of these names compute no text, by part of the model."""
    is_text = in_language_model(model)
    decoder = _decoder(model)
    depth = decoder.count(".") + 1 if decoder else 0
    towers = _towers(model)

    def part(name: str) -> str:
        tower = next((each for each in towers if name.startswith(f"{each}.")), None)
        return tower or ".".join(name.split(".")[:depth])

    return dict(Counter(part(name) for name in linear if not is_text(name)))


def _decoder(model: Any) -> str:
    """Name of the decoder of a composite model; empty where the whole model is one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or text_config(config) is config:
        return ""
    kind = type(text_config(config))
    if kind is type(config):  # an encoder-decoder's, of which transformers makes a copy
        return ""
    models = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return next((name for name, module in models if type(module.config) is kind), "")


def _towers(model: nn.Module) -> list[str]:
    """Names of the models inside this one whose input is not token ids, by what they or their configuration say."""
    if not isinstance(model, PreTrainedModel):
        return []
    embeddings = model.get_input_embeddings()
    parts: dict[str, Any] = getattr(model.config, "sub_configs", None) or {}
    senses = tuple(kind for name, kind in parts.items() if isinstance(kind, type) and _SENSES.search(name))
    return [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, PreTrainedModel)
        and (module.main_input_name != "input_ids" or isinstance(module.config, senses))
        and not any(inner is embeddings for inner in module.modules())
    ]
