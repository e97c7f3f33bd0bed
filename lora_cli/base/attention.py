"""Attention of each example over itself, for rows that hold several examples.

Registered with transformers under one name. A packed forward passes where each example begins (`cu_seq_lens_q`, the
field's name for it), and attention runs example by example: nothing can leak, and the cost is the sum of squares of
the lengths, not the square of the sum. Without it the call is plain SDPA.
"""

from __future__ import annotations

from contextvars import ContextVar
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lora_cli.base.causal_attention import causal_attention
from lora_cli.base.remade import followed, keeping_sources
from lora_cli.base.text import largest

if not {"scale", "window_size", "enable_gqa"} <= {*signature(varlen_attn).parameters}:
    varlen_attn: Any = None  # torch 2.10's has no windows and no shared keys and values

PER_EXAMPLE = "sdpa_per_example"
_CAPABILITY: dict[str, tuple[int, int]] = {}
_examples: ContextVar[int] = ContextVar("examples", default=0)  # on the row of the forward at work, if it is packed


def attention_implementation(config: Any) -> str:
    """Per-example SDPA where the architecture lets attention be chosen, else what the architecture itself offers.

    Some have no SDPA on purpose (Gemma 2 soft-caps its attention logits, which SDPA cannot do): eager is right there.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    if model_class is None:
        return "sdpa"
    if not getattr(model_class, "_supports_sdpa", False):
        return "eager"
    if any(getattr(config, name, None) for name in ("attention_chunk_size", "index_topk")):
        return "sdpa"  # Llama 4 attends within chunks, which its own mask knows; DeepSeek-V3.2's indexer reads the mask
    return PER_EXAMPLE if getattr(model_class, "_supports_attention_backend", False) else "sdpa"


def packed_inputs(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a model's forward for one row holding examples of these lengths, in tokens."""
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    ends = torch.from_numpy(bounds).to(device)
    positions = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)).unsqueeze(0).to(device)
    longest = max(lengths)
    return {
        "position_ids": positions,  # (1, tokens)
        "cu_seq_lens_q": ends,  # (examples + 1,)
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def per_example_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, tokens, head_dim)
    key: Tensor,  # (batch, key_value_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each example; returns (batch, tokens, heads, head_dim), as transformers wants it."""
    if cu_seq_lens_q is None or (attention_mask is not None and not _is_window(attention_mask)):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    if attention_mask is not None:
        sliding_window = int(attention_mask[0, 0, 0, 0])
    if varlen_fits(query.device, query.dtype, max(query.shape[-1], value.shape[-1])):
        return _varlen(query, key, value, sliding_window, scaling, cu_seq_lens_q, kwargs["max_length_q"]), None
    one_example = len(cu_seq_lens_q) == 2 and (sliding_window is None or sliding_window >= query.shape[-2])
    if one_example and query.device.type != "cpu":  # reading where examples end would make a GPU wait
        return _sdpa(module, query, key, value, None, dropout, scaling, **kwargs | {"is_causal": True}), None
    assert dropout == 0, "the frozen path never drops"  # base/load.py switches it off
    lengths = cu_seq_lens_q.diff().tolist()
    out = causal_attention(query, key, value, lengths, sliding_window, scaling)
    return out.contiguous(), None  # as SDPA's: some models view it in another shape


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, *rest, **named)[0]

    return keeping_sources(attend, query, key, value)


def varlen_fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's variable-length attention computes this; its kernel is FlashAttention 2, from Ampere on."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and head_dim % 8 == 0
        and _capability(device) >= (8, 0)
    )


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU that this process trains on. Asked once, before blocks are compiled, which cannot ask."""
    if device.type not in _CAPABILITY:
        _CAPABILITY[device.type] = torch.cuda.get_device_capability(device)
    return _CAPABILITY[device.type]


def packed_attention_name(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """How packed rows are computed, for a person."""
    if attention_implementation(config) != PER_EXAMPLE:
        return "the architecture's own attention with a block mask"
    if device.type == "cpu":
        return "SDPA example by example"
    fits = varlen_fits(device, dtype, head_dim(config))
    return "torch's variable-length attention" if fits else "SDPA with a block mask"


def head_dim(config: Any) -> int:
    """Width of a head's query, key or value; the largest where layers or the three differ."""
    latent = [largest(config, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    stated = [largest(config, name) for name in ("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim")]
    known = [sum(latent), *(size for size in stated if size)]
    if any(known):
        return max(known)
    heads = largest(config, "num_attention_heads")
    return largest(config, "hidden_size") // heads if heads else 0  # a model without attention


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    ends: Tensor,  # (examples + 1,)
    longest: int,
) -> Tensor:
    """(1, tokens, heads, head_dim), without copying anything to the host, so the GPU never waits."""
    # The kernel wants one head_dim, while latent attention has narrower values: zeros beside them change nothing.
    wide = max(query.shape[-1], value.shape[-1])

    def by_token(x: Tensor) -> Tensor:
        """(tokens, heads, head_dim)."""
        x = x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1]))
        return x[0].transpose(0, 1).contiguous()

    q, k, v = (followed(by_token, x) for x in (query, key, value))
    back = -1 if window is None else window - 1  # the window counts the token itself
    settings: Any = {"window_size": (back, 0), "enable_gqa": query.shape[1] != key.shape[1]}
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, **settings)

    out = keeping_sources(attend, q, k, v)
    return out[..., : value.shape[-1]].unsqueeze(0)


def _mask(*, local_size: int | None = None, **settings: Any) -> Tensor | None:
    """No mask for a packed row, whose block mask would be quadratic in all of its tokens; else the one of SDPA.

    Whether the row is packed is known from the call of the model (`watch_rows`): architectures forbid the causal
    shortcut for other reasons too, such as Doge, which adds to the mask. Some pass a sliding window (local_size) to the
    mask alone, such as Qwen2-MoE: the mask of a packed row is then that number, expanded to the shape of a mask, which
    takes no memory.
    """
    tokens = settings["q_length"]
    special = settings.get("attention_mask") is not None or settings.get("use_vmap", False)
    plain = not special and tokens == settings["kv_length"] and not settings.get("allow_is_causal_skip", True)
    if plain and _examples.get() and _by_example(settings):
        return None if local_size is None else torch.tensor(local_size).expand(1, 1, tokens, tokens)
    return sdpa_mask(local_size=local_size, **settings)


def watch_rows(model: nn.Module) -> None:
    """Let masks know whether the model was called with packed rows, and nothing ask the device for padding."""

    def before(_module: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        ends = named.get("cu_seq_lens_q")
        _examples.set(0 if ends is None else len(ends) - 1)

    def after(*_: Any) -> None:
        _examples.set(0)

    module: Any
    for module in model.modules():  # a warning that reads ids from the device; padding is known by its position
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


def _say_nothing(*_: Any) -> None:
    pass


def _by_example(settings: dict[str, Any]) -> bool:
    """Whether attention will go by example: on a device without variable-length attention a block mask costs less.

    There, one call for the whole row with a mask beats a call an example, each of which makes the GPU wait.
    """
    device, config = torch.device(settings.get("device") or "cpu"), settings.get("config")
    if device.type == "cpu":
        return True
    return config is not None and varlen_fits(device, settings.get("dtype") or torch.float32, head_dim(config))


def _is_window(mask: Tensor) -> bool:
    return mask.dtype == torch.long


def _example_of_tokens(position_ids: Tensor) -> Tensor | None:
    """transformers' own function, without its read from the device: how many examples share the row is known here.

    Returns the number of each token's example, (1, tokens), or None for a row of one.
    """
    if not (examples := _examples.get()):
        return _own_example_of_tokens(position_ids)
    if examples == 1:
        return None
    return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


_own_example_of_tokens = masking_utils.find_packed_sequence_indices
masking_utils.find_packed_sequence_indices = _example_of_tokens
AttentionInterface.register(PER_EXAMPLE, per_example_attention)
AttentionMaskInterface.register(PER_EXAMPLE, _mask)
