"""Examples as a person reads them: which tokens are trained, which are context, which are special."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.style import Style
from rich.text import Text
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from lora_cli.data.example import Example
from lora_cli.data.gate import KINDS, Findings
from lora_cli.errors import UNSEEN, escaped, in_html

_TRAINED, _CONTEXT = Style(color="black", bgcolor="green"), Style(dim=True)
_SPECIAL = Style(color="magenta", bold=True)
_TRAINED_SPECIAL = Style(color="white", bgcolor="magenta", bold=True)
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
    special = set(tokenizer.all_special_ids)
    special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [int(id) for id in example.ids]
    texts = _texts_of(ids, tokenizer)
    trained = example.trained.tolist()
    trained[0] = False
    return [Token(id, text, on, id in special) for id, text, on in zip(ids, texts, trained, strict=True)]


def _texts_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds behind the one before it: alone, tokenizers of pieces give no blank at its beginning."""
    backend: Any = tokenizer.backend_tokenizer
    alone = backend.decode_batch([[id] for id in ids], skip_special_tokens=False)
    if isinstance(backend.decoder, decoders.ByteLevel):
        return alone
    both = backend.decode_batch([list(pair) for pair in pairwise(ids)], skip_special_tokens=False)
    behind = [
        text.removeprefix(before) if text.startswith(before) else own
        for text, before, own in zip(both, alone, alone[1:], strict=False)
    ]
    return [*alone[:1], *behind]


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
    """For a terminal. Without colour, trained tokens stand between ⟦ and ⟧."""
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
        for number, line in enumerate(_visible(text).split("\n")):
            if number:
                shown.append("\n")
            shown.append(line, style)
    if inside:
        shown.append("⟧")
    if len(tokens) > MOST_TOKENS:
        shown.append(f" … {len(tokens) - MOST_TOKENS:,} more tokens")
    return shown


def _visible(text: str) -> str:
    """Line ends and tabs that can be seen; control characters that do nothing to a terminal."""
    text = text.replace("\n", "↵\n").replace("\t", "⇥   ").replace("\r", "␍")
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c != "\n" else "␡" if c == "\x7f" else c for c in text)
    return UNSEEN.sub(lambda found: escaped(found[0]), text)


# ── a page ──────────────────────────────────────────────────────────────────────────────────────────────────────

PAGE_START = "<!doctype html>\n<meta name=generator content=lora-check>"
_PAGE = (
    PAGE_START
    + """
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #767b82; --line: #d9dce0;
  --trained: #c4ecc9; --edge: #8fd19a; --special: #8b3fa8; --stop: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #17191c; --faint: #8d939b; --line: #34383d;
  --trained: #1f5130; --edge: #3c8052; --special: #d79bf0; --stop: #ff8a80; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }}
th {{ font-weight: 600; border-bottom: 1px solid var(--line); }} .n {{ text-align: right; }}
.stop {{ color: var(--stop); }} .faint {{ color: var(--faint); }}
pre {{ font: 13px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid
  var(--line); border-radius: 6px; padding: .8rem 1rem; }}
pre span {{ color: var(--faint); border-radius: 2px; }} pre span:hover {{ outline: 1px solid currentColor; }}
pre .t {{ color: var(--ink); background: var(--trained); box-shadow: inset 1px 0 var(--edge); }}
pre .s {{ color: var(--special); font-weight: 600; }}
</style>
<h1>{title}</h1>
<p>{lines}</p>
<p><span style="background: var(--trained)">trained</span> · <span class=faint>context</span> ·
<span style="color: var(--special); font-weight: 600">special</span> — point at a token for its id</p>
{findings}
{rows}
"""
)


def as_page(
    title: str,
    lines: Sequence[str],
    findings: Findings,
    allowed: Sequence[str],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """One HTML file that needs no other: what is known of the data, what the gate found, and the tokens of examples."""
    return _PAGE.format(
        title=in_html(title),
        lines="<br>".join(map(in_html, lines)),
        findings=_findings_table(findings, allowed),
        rows="\n".join(_row(example, tokenizer) for example in examples),
    )


def _findings_table(findings: Findings, allowed: Sequence[str]) -> str:
    found = findings.as_list(allowed)
    if not found:
        return "<p>The gate found nothing.</p>"
    rows = "".join(
        f"<tr{' class=stop' if each['stops'] else ''}><td class=n>{each['count']:,}<td>"
        f"{in_html(KINDS[each['kind']].title)}<td>{in_html(findings.rows(each['kind']))}"
        f"<td>{in_html(each['fix'])}"
        for each in found
    )
    return f"<table><tr><th class=n>rows<th>what<th>where<th>fix{rows}</table>"


def _row(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    shown = []
    for text, token, size in pieces(tokens_of(example, tokenizer), tokenizer):
        kind = " ".join(name for name, on in (("t", token.trained), ("s", token.special)) if on)
        title = f"{token.id}" if size == 1 else f"{token.id} and {size - 1} more"
        kind = f' class="{kind}"' if kind else ""
        shown.append(f'<span{kind} title="{title}">{in_html(_visible(text))}</span>')
    head = f"{example.source}: {len(example.ids):,} tokens, {example.targets:,} trained"
    return f"<h2>{in_html(head)}</h2>\n<pre>{''.join(shown)}</pre>"
