"""From documents to examples: rendered, tokenized in batches, and masked; each mask is proved by decoding it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli import limits
from lora_cli.data.chat.masks import Masks
from lora_cli.data.chat.spans import NotPrompted, Rendered, render_whole, render_with_spans
from lora_cli.data.chat.template import ChatTemplate, wants_bos
from lora_cli.data.example import Example, Span
from lora_cli.data.files.readers import Row
from lora_cli.data.formats import Completion, Conversation, Document, Format, Text
from lora_cli.data.gate import Encoded, Finding, nothing_trained, refused, special_in_text, unstopped
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached

_MOST_OVER_LIMIT = (
    5  # rows at which the template reaches a limit: so many are findings, then it is the template's fault
)
TRAIN_ON = {  # format → what may be trained, the default first
    "text": ("all",),
    "completion": ("completion", "all"),
    "instruction": ("assistant", "completion", "last_assistant", "all"),
    "chat": ("assistant", "last_assistant", "all"),
}


@dataclass(frozen=True)
class Prepared:
    """A document as text for the tokenizer. special: whether it adds its own BOS. rendered: of a conversation.

    prompt: of a completion. prompt_ends: what comes before each trained turn, from its last special token on.
    """

    document: Document
    text: str
    special: bool
    prompt: str | None = None
    rendered: Rendered | None = None
    prompt_ends: Sequence[str] = ()

    def trained_texts(self, encoder: Encoder) -> Iterable[str]:
        if self.rendered is not None:
            return [self.text[span.start : span.end] for span in self.rendered.spans]
        if isinstance(self.document, Completion) and encoder.train_on != "all":
            return [self.document.completion]
        return [self.text]


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows: an encoding of each text, and of each prompt alone; of conversations, of its end."""

    prepared: Sequence[Prepared | Encoded]
    encodings: list[Any]
    prompts: list[Any]
    prompt_ends: dict[str, list[int]]


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples, in three stages that can run side by side.

    template: needed for conversations. train_on: as in the recipe.
    """

    format: Format
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None = None
    train_on: str | None = None
    _over_limit: list[int] = field(default_factory=list)  # of each row at which the template reached a limit: its steps

    def tokenize(self, prepared: Sequence[Prepared | Encoded]) -> Tokenized:
        """The second stage: all texts at once, in the tokenizers library, which needs no lock of the interpreter."""
        good = [each for each in prepared if isinstance(each, Prepared)]
        prompts = [each.prompt for each in good if each.prompt is not None]
        encodings = self._tokens([each.text for each in good], [each.special for each in good])
        ends = self._masks.tokens_alone([end for each in good for end in each.prompt_ends])
        return Tokenized(prepared, encodings, self._tokens(prompts, [True] * len(prompts)), ends)

    def encode(self, tokenized: Tokenized) -> list[Encoded]:
        """The third stage: masks, and their proof; one result a row, in order."""
        encodings, prompts = iter(tokenized.encodings), iter(tokenized.prompts)
        examples: list[Encoded] = []
        for each in tokenized.prepared:
            if isinstance(each, Encoded):
                examples.append(each)
            else:
                prompt = next(prompts) if each.prompt is not None else None
                examples.append(self._masked(each, next(encodings), prompt, tokenized.prompt_ends))
        return self._proved(examples, [each for each in tokenized.prepared if isinstance(each, Prepared)])

    # ── before tokenizing ────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, row: Row) -> Prepared | Encoded:
        """The first stage: a row as text for the tokenizer. Errors are findings, not raised."""
        try:
            document = self.format.read(row)
            if document is None:
                return Encoded(row, None, Finding("left_out"))
            if isinstance(document, Text):
                if not document.text.strip():
                    return refused(document, "empty", "the text is empty", "remove the row")
                return Prepared(document, document.text, special=True)
            if isinstance(document, Completion):
                if not (document.prompt + document.completion).strip():
                    return refused(document, "empty", "prompt and completion are empty", "remove the row")
                if not document.completion and self.train_on != "all":
                    return nothing_trained(document)
                return Prepared(document, document.prompt + document.completion, True, prompt=document.prompt)
            return self._prepared_conversation(document)
        except LimitReached as error:  # of the template; too many such rows would take all day
            assert self.template is not None
            self._over_limit.append(self.template.steps)
            if len(self._over_limit) >= _MOST_OVER_LIMIT or sum(self._over_limit[1:]) >= limits.TEMPLATE_MOST_STEPS:
                raise
            return Encoded(row, None, Finding("malformed", error))
        except NotPrompted as error:
            return Encoded(row, None, Finding("not_prompted", error))
        except LoraError as error:
            return Encoded(row, None, Finding("malformed", error))

    def _prepared_conversation(self, document: Conversation) -> Prepared | Encoded:
        if not any(turn["content"].strip() or turn.get("tool_calls") for turn in document.turns):
            return refused(document, "empty", "every turn is empty", "remove the row")
        assert self.template is not None
        where = document.row.where
        if self.train_on == "all":
            spoken = [weight for weight, turn in zip(document.weights, document.turns, strict=True) if _spoken(turn)]
            if any(weight != document.weight for weight in spoken):
                fix = "write data.train_on: assistant, or remove train and weight"
                raise LoraError("train_on: all has no place for weights of turns", where=where, fix=fix)
            text = render_whole(self.template, document.turns, where, document.tools)
            return Prepared(document, text, special=False)
        wanted = [at for at, turn in enumerate(document.turns) if _spoken(turn)]
        if self.train_on in ("last_assistant", "completion"):
            wanted = wanted[-1:]  # also where it says nothing: then there is nothing to train
        wanted = [at for at in wanted if document.weights[at] > 0 and _says_something(document.turns[at])]
        if not wanted:
            return nothing_trained(document)
        try:
            rendered = render_with_spans(self.template, document.turns, wanted, where, document.tools)
        except LimitReached:
            raise
        except LoraError:
            if found := special_in_text(document, self.template):  # which misleads the template
                return Encoded(document.row, None, found)
            raise
        ends = self._masks.prompt_ends(rendered.text, rendered.spans, self.template.special)
        return Prepared(document, rendered.text, special=False, rendered=rendered, prompt_ends=ends)

    def _tokens(self, texts: list[str], special: list[bool]) -> list[Any]:
        """Encodings of the tokenizers library, which works on all texts at once, on all cores."""
        if not texts:
            return []
        backend = self._backend
        if all(special) or not any(special):
            return backend.encode_batch_fast(texts, add_special_tokens=bool(special[0]))
        chosen = {flag: [at for at, each in enumerate(special) if each == flag] for flag in (True, False)}
        found: list[Any] = [None] * len(texts)
        for flag, places in chosen.items():
            for at, encoding in zip(
                places, backend.encode_batch_fast([texts[at] for at in places], add_special_tokens=flag), strict=True
            ):
                found[at] = encoding
        return found

    # ── after tokenizing ────────────────────────────────────────────────────────────────────────────────────

    def _masked(self, each: Prepared, encoding: Any, prompt: Any, prompt_ends: dict[str, list[int]]) -> Encoded:
        document, ids, proved = each.document, encoding.ids, False
        notes: list[str] = [*document.notes] if isinstance(document, Conversation) else []
        found: list[Finding] = []
        if isinstance(document, Text):
            ids = self._unended(ids)
            ids = ids if ids and ids[-1] == self._end else [*ids, self._end]
            spans: list[Span] = [(0, len(ids), document.weight)]
        elif isinstance(document, Completion):
            ids, spans = self._completion(document, ids, prompt.ids)
        elif each.rendered is None:
            spans = [(0, len(ids), document.weight)]
        else:
            turns = each.rendered.spans
            ends = [(end, prompt_ends[end]) for end in each.prompt_ends]
            try:
                placed = self._masks.place(each.text, ids, turns, ends)
            except LookupError:
                error = LoraError(
                    "a trained turn has no tokens: the tokenizer drops its characters",
                    where=document.row.where,
                    fix="remove the row",
                )
                return Encoded(document.row, None, Finding("not_round_trip", error))
            ids, proved = placed.ids, placed.proved
            spans = [(*at, document.weights[turn.turn]) for at, turn in zip(placed.spans, turns, strict=True)]
            found, more = self._turn_findings(document, each.rendered, ids, spans)
            notes += more
        if isinstance(document, Conversation):
            ids, spans = self._with_bos(ids, spans)
        if self._bos is not None and ids[:2] == [self._bos] * 2:
            error = LoraError("two BOS tokens at the start", where=document.row.where, fix="remove the one in the text")
            found.append(Finding("double_bos", error))
        if isinstance(document, Conversation) and self.template is not None:
            special = special_in_text(document, self.template)
            found = found if special is None else [special, *found]
        example = Example(ids, spans, document.row.file, document.row.number)
        if not example.targets:
            return nothing_trained(document)
        if each.rendered is None:
            spelled = self._masks.bytes_of(encoding.ids)
            kept = not isinstance(document, Completion) or ids[: len(encoding.ids)] == encoding.ids
            proved = kept and spelled is not None and b"".join(spelled) == each.text.encode()
        return Encoded(document.row, example, found[0] if found else None, tuple(notes), proved, tuple(found[1:]))

    def _turn_findings(
        self, document: Conversation, rendered: Rendered, ids: list[int], spans: Sequence[Span]
    ) -> tuple[list[Finding], list[str]]:
        """Findings about the trained turns, and notes."""
        found: list[Finding] = []
        for turn, (_, last, _) in zip(rendered.spans, spans, strict=True):
            if not turn.stopped:
                found.append(unstopped(document, self.template, turn.turn))
            elif ids[last - 1] not in self._masks.special:
                token = str(self._backend.id_to_token(ids[last - 1]))
                found.append(unstopped(document, self.template, turn.turn, token))
        found = found[:1]
        if rendered.two_forms is not None:
            found.append(Finding("two_forms", rendered.two_forms))
        notes = ["empty_thoughts"] if any(turn.empty_thoughts for turn in rendered.spans) else []
        return found, notes + ["forgotten_thoughts"] * rendered.forgotten

    def _completion(self, document: Completion, together: list[int], prompt: list[int]) -> tuple[list[int], list[Span]]:
        """Prompt, completion and the end token; the prompt is tokenized as it will be on its own."""
        context, together = self._unended(prompt), self._unended(together)
        if together[: len(context)] == context:
            answer = together[len(context) :]
        else:  # a token would span the border: keep the prompt as the model will meet it
            answer = self._masks.continued(context, document.completion)
        ids = [*context, *answer]
        ids += [] if answer and answer[-1] == self._end else [self._end]
        return ids, [(0 if self.train_on == "all" else len(context), len(ids), document.weight)]

    def _with_bos(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """A template that writes no BOS, for a tokenizer that wants one: it is put in front."""
        if not self._wants_bos or ids[:1] == [self._bos]:
            return ids, spans
        return [self._bos, *ids], [(first + 1, last + 1, weight) for first, last, weight in spans]

    def _unended(self, ids: list[int]) -> list[int]:
        """Without the end token that some tokenizers add by themselves."""
        return ids[:-1] if self._adds_end and ids and ids[-1] == self._end else ids

    @cached_property
    def _adds_end(self) -> bool:
        return self._backend.encode("a", add_special_tokens=True).ids[-1] == self._end

    def _proved(self, encoded: list[Encoded], prepared: list[Prepared]) -> list[Encoded]:
        """Decodes what is trained and compares it with what was to be trained; a difference becomes a finding.

        That is done already where the bytes of all tokens are the text's own and each span's are the turn's.
        """
        expected = {id(each.document.row): each for each in prepared}
        checks: list[tuple[int, Any, str]] = []  # which example, tokens, what they are to spell
        for at, each in enumerate(encoded):
            if each.example is None or each.proved:
                continue
            whole, source = each.example.ids, expected[id(each.row)]
            runs = [whole[first:last] for first, last, _ in each.example.spans]
            texts = [*source.trained_texts(self), source.text]  # what is not trained has to be there too
            checks += [(at, run, text) for run, text in zip([*runs, whole], texts, strict=True)]
        decoded = self._backend.decode_batch([run for _, run, _ in checks], skip_special_tokens=False)
        for (at, _, text), back in zip(checks, decoded, strict=True):
            known = any(found.kind == "not_round_trip" for found in encoded[at].findings)
            if not known and not self._spells(back, text):
                encoded[at] = self._lossy(encoded[at], text, back)
        return encoded

    def _spells(self, back: str, text: str) -> bool:
        """Whether tokens give back a text, but for white space and Unicode's compatibility forms.

        A BOS in front and an end token at the end may have been added.
        """
        bos, end = str(self.tokenizer.bos_token or ""), str(self.tokenizer.eos_token)
        wanted, plain = _plain(text), _plain(back)
        around = ("", _plain(bos)), ("", _plain(end))
        return any(plain == before + wanted + behind for before in around[0] for behind in around[1])

    def _lossy(self, encoded: Encoded, text: str, back: str) -> Encoded:
        lost = sorted(set(_plain(text)) - set(_plain(back)))
        what = (
            f"the tokenizer cannot give back {' '.join(map(repr, lost[:5]))}" if lost else "the tokens spell other text"
        )
        error = LoraError(
            what, where=encoded.row.where, fix="replace these characters, or use a model whose tokenizer has them"
        )
        lossy = Finding("not_round_trip", error)
        if encoded.finding is not None:
            return replace(encoded, also=(*encoded.also, lossy))
        return replace(encoded, finding=lossy)

    # ── what the tokenizer is ───────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _masks(self) -> Masks:
        return Masks(self.tokenizer)

    @cached_property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer

    @cached_property
    def _end(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    @cached_property
    def _bos(self) -> Any:
        return self.tokenizer.bos_token_id

    @cached_property
    def _wants_bos(self) -> bool:
        return wants_bos(self.tokenizer)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _spoken(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant"


def _says_something(turn: dict[str, Any]) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def target_bytes(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the target tokens spell; special tokens spell none."""
    total = 0
    for example in examples:
        for first, last, _ in example.spans:
            run = [int(token) for token in example.ids[max(first, 1) : last]]
            text: Any = tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            total += len(text.encode())
    return total
