"""Examples as a person reads them: which tokens are trained, which are context, which are special."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.text import Text
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from lora_cli.data.example import Example
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Findings
from lora_cli.errors import UNSEEN, escaped
from lora_cli.pages.render import render

_TRAINED, _CONTEXT = Style(color="black", bgcolor="green"), Style(dim=True)
_SPECIAL = Style(color="magenta", bold=True)
_TRAINED_SPECIAL = Style(color="white", bgcolor="magenta", bold=True)
PAGE_MARK = b"<meta name=generator content=lora-check>"  # near the start of every page of ours
_SYMBOLS = {code: 0x2400 + code for code in range(32)} | {ord("\n"): "↵\n", ord("\t"): "⇥   ", 0x7F: "␡"}
MOST_TOKENS = 600  # of one example on a terminal


@dataclass(frozen=True)
class Token:
    """One token of an example. trained: whether it is a target of the loss; the first of an example never is."""

    id: int
    text: str
    trained: bool
    special: bool


def tokens_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """The tokens of an example, exactly as a run is given them."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    ids = [int(id) for id in example.ids]
    texts = _texts_of(ids, tokenizer)
    trained = example.trained.tolist()
    trained[0] = False
    return [Token(id, text, on, id in special) for id, text, on in zip(ids, texts, trained, strict=True)]


def tokens_as_dicts(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """For --json."""
    found = tokens_of(example, tokenizer)
    return [{"id": token.id, "text": token.text, "trained": token.trained} for token in found]


def _texts_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds behind the one before it: alone, tokenizers of pieces give no blank at its beginning."""
    backend: Any = tokenizer.backend_tokenizer
    alone = backend.decode_batch([[id] for id in ids], skip_special_tokens=False)
    if isinstance(backend.decoder, decoders.ByteLevel):
        return alone
    both = backend.decode_batch([list(pair) for pair in pairwise(ids)], skip_special_tokens=False)
    behind = zip(both, alone, alone[1:], strict=False)
    added = (text.removeprefix(before) if text.startswith(before) else own for text, before, own in behind)
    return [*alone[:1], *added]


def pieces(tokens: Sequence[Token], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Token, int]]:
    """(text, first token, tokens): neighbours are joined where a character is spread over several of them."""
    backend: Any = tokenizer.backend_tokenizer
    at = 0
    while at < len(tokens):
        size = 1
        text = tokens[at].text
        while "\ufffd" in text and size < 4 and at + size < len(tokens):
            size += 1
            text = backend.decode([token.id for token in tokens[at : at + size]], skip_special_tokens=False)
        if "\ufffd" in text:
            size, text = 1, tokens[at].text
        yield text, tokens[at], size
        at += size


def as_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> Text:
    """For a terminal. Without colour, trained tokens are shown between ⟦ and ⟧."""
    tokens = tokens_of(example, tokenizer)
    shown = Text(overflow="fold")
    inside = False
    for text, token, _ in pieces(tokens[:MOST_TOKENS], tokenizer):
        if not colour and token.trained != inside:
            shown.append("⟦" if token.trained else "⟧")
            inside = token.trained
        style = _SPECIAL if token.special else _CONTEXT
        if token.trained:
            style = _TRAINED_SPECIAL if token.special else _TRAINED
        shown.append(_visible(text), style)
    if inside:
        shown.append("⟧")
    if len(tokens) > MOST_TOKENS:
        shown.append(f" … {len(tokens) - MOST_TOKENS:,} more tokens")
    return shown


def print_tokens(console: Console, example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    shown = as_text(example, tokenizer, colour=console.is_terminal and not console.no_color)
    console.print(Padding(shown, (0, 0, 0, 2), expand=False))


def _visible(text: str) -> str:
    """Line ends and tabs that can be seen; control characters that do nothing to a terminal."""
    return UNSEEN.sub(lambda found: escaped(found[0]), text.translate(_SYMBOLS))


def as_page(
    title: str,
    lines: Sequence[str],
    findings: Findings,
    allowed: Sequence[str],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """One HTML file that needs no other: what is known of the data, what the checks found, the tokens of examples."""
    found = findings.as_list(allowed)
    found = [each | {"title": KINDS[each["kind"]].title, "where": findings.rows(each["kind"])} for each in found]
    shown = [
        (
            f"{example.source}: {len(example.ids):,} tokens, {example.targets:,} trained",
            [(_visible(text), token, size) for text, token, size in pieces(tokens_of(example, tokenizer), tokenizer)],
        )
        for example in examples
    ]
    return render("preview.html.jinja", title=title, lines=lines, findings=found, examples=shown)
