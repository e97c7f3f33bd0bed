"""Attention of each example over itself, for rows that hold several examples.

Registered with transformers under one name. A packed forward passes where each example begins (`cu_seq_lens_q`, the
field's name for it), and attention runs example by example: nothing can leak, and the cost is the sum of squares of
the lengths, not the square of the sum. Without it the call is plain SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PER_EXAMPLE = "sdpa_per_example"


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
    if getattr(config, "attention_chunk_size", None):  # Llama 4 attends within chunks: only its own mask knows them
        return "sdpa"
    return PER_EXAMPLE if getattr(model_class, "_supports_attention_backend", False) else "sdpa"


def packed_inputs(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a model's forward for one row holding examples of these lengths, in tokens."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
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
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is not None:
        sliding_window = int(attention_mask[0, 0, 0, 0])
    grouped = query.shape[1] != key.shape[1]
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            at = torch.arange(length, device=q.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for a packed row, whose block mask would be quadratic in all of its tokens; else the one of SDPA.

    transformers marks packed rows by forbidding the causal shortcut without a mask overlay (which would set use_vmap).
    Some architectures tell a sliding window (local_size) to the mask alone, such as Qwen2-MoE: the mask of a packed row
    then is that number, expanded to the shape of a mask without its memory.
    """
    if attention_mask is None and q_length == kv_length and not allow_is_causal_skip and not use_vmap:
        return None if local_size is None else torch.tensor(local_size).expand(1, 1, q_length, kv_length)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        local_size=local_size,
        **kwargs,
    )


def _is_window(mask: Tensor) -> bool:
    return mask.dtype == torch.long


AttentionInterface.register(PER_EXAMPLE, per_example_attention)
AttentionMaskInterface.register(PER_EXAMPLE, _mask)
