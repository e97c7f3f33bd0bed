"""Chat templates of well-known model families with small tokenizers to match: what conversations meet in practice.

The templates in chat_templates/ keep the peculiarities of the real ones; long prose in them is shortened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tiny_model import make_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """A chat template, and what its tokenizer and its conversations are like."""

    name: str  # of the file in chat_templates/
    bos: str | None
    eos: str
    turn_end: str  # the token that ends an assistant turn
    special: tuple[str, ...] = ()  # further special tokens
    added: tuple[str, ...] = ()  # tokens of their own that are not special
    rstrip: bool = False  # the further special tokens swallow the white space after them
    wants_bos: bool = False  # the tokenizer puts bos in front when asked for special tokens
    system: bool = True  # takes a system turn
    tools: bool = False  # lists tools, renders calls and their results
    thinking: bool = False  # treats thoughts apart from the answer


IM, EOT, ENDOFTEXT = ("<|im_start|>", "<|im_end|>"), "<|eot_id|>", "<|endoftext|>"
HERMES = ("<tool_call>", "</tool_call>")
GEMMA = ("<start_of_turn>", "<end_of_turn>", "<pad>", "<unk>")
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK_ADDED = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)

_TABLE = [
    Family(
        "llama-3.1",
        bos="<|begin_of_text|>",
        eos=EOT,
        turn_end=EOT,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>"),
        wants_bos=True,
        tools=True,
    ),
    Family("qwen2.5", None, "<|im_end|>", "<|im_end|>", special=(*IM, ENDOFTEXT), added=HERMES, tools=True),
    Family(
        "qwen3",
        bos=None,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        special=(*IM, ENDOFTEXT),
        added=(*HERMES, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        tools=True,
        thinking=True,
    ),
    Family("gemma-2", "<bos>", "<eos>", "<end_of_turn>", special=GEMMA, wants_bos=True, system=False),
    Family("gemma-3", "<bos>", "<eos>", "<end_of_turn>", special=(*GEMMA, "<start_of_image>"), wants_bos=True),
    Family(
        "mistral-v0.3",
        bos="<s>",
        eos="</s>",
        turn_end="</s>",
        special=(
            "<unk>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        wants_bos=True,
        tools=True,
    ),
    Family(
        "phi-3",
        bos="<s>",
        eos=ENDOFTEXT,
        turn_end="<|end|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        rstrip=True,
    ),
    Family("smollm2", "<|im_start|>", "<|im_end|>", "<|im_end|>", special=(ENDOFTEXT,)),
    Family(
        "smollm3",
        bos=None,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        special=(*IM, "<|begin_of_text|>", "<|end_of_text|>"),
        added=(*HERMES, "<think>", "</think>"),
        thinking=True,
    ),
    Family("deepseek-v3", DEEPSEEK_BOS, DEEPSEEK_EOS, DEEPSEEK_EOS, added=DEEPSEEK_ADDED, wants_bos=True),
    Family(
        "deepseek-r1",
        bos=DEEPSEEK_BOS,
        eos=DEEPSEEK_EOS,
        turn_end=DEEPSEEK_EOS,
        added=(*DEEPSEEK_ADDED, "<think>", "</think>"),
        wants_bos=True,
        thinking=True,
    ),
    Family("olmo-2", ENDOFTEXT, ENDOFTEXT, ENDOFTEXT, special=("<|pad|>",)),
    Family("tulu-3", "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", special=("<pad>",), wants_bos=True),
    Family("zephyr", "<s>", "</s>", "</s>", special=("<unk>",), wants_bos=True),
]
FAMILIES = {family.name: family for family in _TABLE}


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with the family's tokens and chat template; padding is its eos."""
    backend = Tokenizer.from_str(_backend_without_added_tokens())
    named = [token for token in (family.bos, family.eos) if token]
    special = [token for token in family.special if token not in named]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=family.rstrip) for token in special]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    if family.wants_bos:
        assert family.bos
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=[family.bos, "$A"], pair=[family.bos, "$A", f"{family.bos}:1", "$B:1"], special_tokens=[bos]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    tokenizer.chat_template = (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@cache
def _backend_without_added_tokens() -> str:
    backend = json.loads(make_tokenizer(480).backend_tokenizer.to_str())  # 512 holds the added ones too
    return json.dumps(backend | {"added_tokens": []})
