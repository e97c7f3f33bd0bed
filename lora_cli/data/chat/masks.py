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

from lora_cli.data.chat.spans import Span as TurnSpan

_LOOK_BACK = 96  # characters in front of an answer in which its prompt nearly always has a special token
_KEPT = 4096  # prompts' ends whose tokens are remembered


@dataclass(frozen=True)
class Placed:
    """Tokens of a text. spans: first token of each trained turn, and one past its last. proved: they spell the text."""

    ids: list[int]
    spans: list[tuple[int, int]]
    proved: bool


class Masks:
    """Tokens of rendered conversations, with those of each trained turn behind those of its prompt alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._known: dict[str, list[int]] = {}

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
            found = None
            for low in (max(before, span.start - _LOOK_BACK), before):
                for each in special.finditer(text, low, span.start):
                    found = each.start()
                if found is not None:
                    break
            ends.append(text[before if found is None else found : span.start])
            before = span.start if span.stopped else span.end
        return ends

    def tokens_alone(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens of each of these prompts' ends."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = self._backend.encode_batch_fast(new, add_special_tokens=False) if new else []
        made = {text: encoding.ids for text, encoding in zip(new, found, strict=True)}
        known = {text: self._known[text] for text in texts if text in self._known}
        if len(self._known) < _KEPT:
            self._known |= {text: ids for text, ids in made.items() if len(text) <= _LOOK_BACK}
        return known | made

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def place(
        self, text: str, ids: list[int], spans: Sequence[TurnSpan], prompts: Sequence[tuple[str, list[int]]]
    ) -> Placed:
        """ids: of the whole text. prompts: the end of what comes before each span, and its tokens alone.

        Raises LookupError where a span has no tokens.
        """
        data = text.encode()
        spelled = self.bytes_of(ids)
        if spelled is not None and b"".join(spelled) == data:
            ends = list(accumulate(map(len, spelled)))
            starts: Sequence[int] = [0, *ends]
        else:
            starts, ends = zip(*self._backend.encode(text, add_special_tokens=False).offsets, strict=True)
            spelled = None
        in_bytes = spelled is not None and len(data) != len(text)

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
                    raise LookupError
                made += ids[done:at]
                del made[len(made) - max(0, done - at) :]  # the stop token before, with which the prompt's end begins
                made += alone
                places.append((len(made), len(made) + len(answer)))
                made += answer
            done = last
        made += ids[done:]
        again = self.bytes_of(made) if spelled is not None and made != ids else spelled
        return Placed(made, places, again is not None and b"".join(again) == data)

    def continued(self, before: list[int], text: str) -> list[int]:
        """The tokens of a text that follows others. A blank that some tokenizers begin any text with is not put in."""
        alone = self._backend.encode(text, add_special_tokens=False).ids
        spelled = self.bytes_of(alone)
        if spelled is not None and b"".join(spelled) == text.encode():
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

    def bytes_of(self, ids: Sequence[int]) -> list[bytes] | None:
        """The bytes that each token spells, of a byte-level tokenizer; None for others. Far cheaper than offsets."""
        table = self._bytes_of_token
        return None if table is None else [table[id] for id in ids]

    @cached_property
    def _bytes_of_token(self) -> list[bytes] | None:
        """By id. Such a vocabulary writes bytes as printable characters (Radford et al. 2019, encoder.py)."""
        backend = self._backend
        if not isinstance(backend.decoder, decoders.ByteLevel):
            return None
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        latin_1 = {256 + at: byte for at, byte in enumerate(others)}
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        table = [b""] * (max(*vocabulary.values(), *added) + 1)
        for token, id in vocabulary.items():
            table[id] = token.translate(latin_1).encode("latin-1", "ignore")
        for id, token in added.items():
            table[id] = token.content.encode()
        return table
