"""From characters to tokens: the trained tokens of a turn follow those of its prompt, as at generation.

A prompt is tokenized alone when a model generates. Where the tokens of the whole text begin differently, because one of
them would span the border of prompt and answer, or because what follows changes how the prompt's end is cut, the prompt
keeps the tokens that it has alone, and the answer gets its own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lora_cli.data.chat.spans import Span as TurnSpan


@dataclass(frozen=True)
class Placed:
    """Tokens of a text. spans: first token of each trained turn, and one past its last. proved: they spell the text."""

    ids: list[int]
    spans: list[tuple[int, int]]
    proved: bool


class Masks:
    """Tokens of texts, with those of each trained turn behind those of its prompt alone.

    special: the tokenizer adds what it puts around a text; templates write that themselves.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool):
        self._tokenizer, self._adds_special = tokenizer, special
        self._backend: Any = tokenizer.backend_tokenizer

    @cached_property
    def special(self) -> set[int]:
        added = {id for id, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return added | set(self._tokenizer.all_special_ids)

    # ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def prompt_ends(self, text: str, spans: Sequence[TurnSpan], special: re.Pattern[str]) -> list[str]:
        """What comes before each span, from the last special token on: no token crosses the edge of a special token.

        So its tokens are the same there as behind all that comes before.
        """
        ends = []
        before = 0
        for span in spans:
            starts = [found.start() for found in special.finditer(text, before, span.start)]
            ends.append(text[starts[-1] if starts else before : span.start])
            before = span.start if span.stopped else span.end
        return ends

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, all made at once, on all cores."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=self._adds_special)
        return [encoding.ids for encoding in found]

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def place(
        self, text: str, ids: list[int], spans: Sequence[TurnSpan], prompts: Sequence[tuple[str, list[int]]]
    ) -> Placed | None:
        """ids: of the whole text. prompts: the end of what comes before each span, and its tokens alone.

        None where a span has no tokens.
        """
        spelled = self.spelled(ids, text)
        if spelled is not None:
            starts: Sequence[int] = [0, *accumulate(map(len, spelled))]
        else:
            starts = [start for start, _ in self._backend.encode(text, add_special_tokens=False).offsets]
        in_bytes = spelled is not None and not text.isascii()

        def place_of(character: int) -> int:
            return len(text[:character].encode()) if in_bytes else character

        made: list[int] = []
        places = []
        done = 0
        for span, (prompt, alone) in zip(spans, prompts, strict=True):
            at = bisect_left(starts, place_of(span.start - len(prompt)), 0, len(ids))
            first = at + len(alone)
            last = bisect_left(starts, place_of(span.end), at, len(ids))
            if ids[at:first] == alone and first < last:
                made += ids[done:last]
                places.append((len(made) - (last - first), len(made)))
            else:
                answer = self.continued(alone, text[span.start : span.end])
                if not answer:
                    return None
                made += ids[done:at]
                del made[len(made) - max(0, done - at) :]  # the stop token before, with which the prompt's end begins
                made += alone
                places.append((len(made), len(made) + len(answer)))
                made += answer
            done = last
        made += ids[done:]
        proved = spelled is not None and (made == ids or self.spelled(made, text) is not None)
        return Placed(made, places, proved)

    def continued(self, before: list[int], text: str) -> list[int]:
        """The tokens of a text that follows others. A blank that some tokenizers begin any text with is not put in."""
        alone = self._backend.encode(text, add_special_tokens=False).ids
        if self.spelled(alone, text) is not None:
            return alone
        wanted = self._decoded(before) + text
        for anchor in ("\n", "a", "."):
            both, first = (self._backend.encode(each, add_special_tokens=False).ids for each in (anchor + text, anchor))
            if self._decoded([*before, *alone]) == wanted:
                break
            if both[: len(first)] == first and self._decoded([*before, *both[len(first) :]]) == wanted:
                return both[len(first) :]
        return alone

    def _decoded(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def spelled(self, ids: Sequence[int], text: str) -> list[bytes] | None:
        """The bytes that each token spells, if together they are the text's; None for tokenizers that have none.

        Far cheaper than offsets.
        """
        table = self._bytes_of_token
        found = None if table is None else [table[id] for id in ids]
        return found if found is not None and b"".join(found) == text.encode() else None

    @cached_property
    def _bytes_of_token(self) -> list[bytes] | None:
        """By id, of a byte-level tokenizer: its vocabulary writes bytes as printable characters."""
        backend = self._backend
        if not isinstance(backend.decoder, decoders.ByteLevel):
            return None
        latin_1 = {ord(character): byte for byte, character in bytes_to_unicode().items()}
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        table = [b""] * (max(*vocabulary.values(), *added) + 1)
        for token, id in vocabulary.items():
            table[id] = token.translate(latin_1).encode("latin-1", "ignore")
        for id, token in added.items():
            table[id] = token.content.encode()
        return table
