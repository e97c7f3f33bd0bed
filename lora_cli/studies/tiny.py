"""A tiny random model with a real tokenizer, made here: what the equalities are measured on where no model is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [str(module.__doc__) for module in (sys, Path, str, int, list, dict, Exception)] + [
    "select count from table where name is order by limit group by the of and to in a is that for it as with",
    "question answer user assistant system how many which what are there list show give me all",
]
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def make_tokenizer(vocabulary: int = 512) -> Any:
    """A byte-level BPE tokenizer with a ChatML template, trained on TEXTS.

    Most are docstrings of the running Python, so another version may give another vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama_config() -> Any:
    """2 layers, 64 wide, grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def save_tiny(config: Any, folder: Path, *, seed: int = 0, dtype: Any = None, tokenizer: Any = None) -> Path:
    """A random causal LM of this config with a tokenizer, saved as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder
