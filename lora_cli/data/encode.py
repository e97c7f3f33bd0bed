"""From documents to examples: rendered, tokenized in batches, and masked; each mask is proved by decoding it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html.entities import html5
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli import limits
from lora_cli.data.chat.masks import Masks
from lora_cli.data.chat.spans import NotPrompted, Rendered, render_whole, render_with_spans
from lora_cli.data.chat.template import ChatTemplate, wants_bos
from lora_cli.data.example import Example, Span
from lora_cli.data.files.readers import Row
from lora_cli.data.formats import Completion, Conversation, Document, Format
from lora_cli.data.gate import Encoded, Finding, nothing_trained, problem, refused, special_in_text, unstopped
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached

_MOST_OVER_LIMIT = 5  # rows at which the template reaches a limit: so many are findings, then the template is refused
_PLACEHOLDERS = ("n/a", "-", "--", "–", "—", "todo", "tbd", "nan", "null", "?", "…", "...")  # whole answers, any case
_ENTITY = re.compile(r"&(#\d{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)")
TRAIN_ON = {  # format → what may be trained, the default first
    "text": ("all",),
    "completion": ("completion", "all"),
    "instruction": ("assistant", "completion", "last_assistant", "all"),
    "chat": ("assistant", "last_assistant", "all"),
}


@dataclass
class Prepared:
    """A document as text for the tokenizer. rendered: of a conversation whose turns are trained.

    prompts: that of a completion, or what comes before each trained turn, from its last special token on.
    trained: the texts that are trained. ids, alone: tokens of the text and of each prompt, from the second stage.
    """

    document: Document
    text: str
    prompts: Sequence[str]
    trained: Sequence[str]
    rendered: Rendered | None = None
    ids: list[int] = field(default_factory=list)
    alone: list[list[int]] = field(default_factory=list)


class Encoder:
    """Turns rows into examples, in three stages that can run side by side.

    template: needed for conversations. train_on: as in the recipe.
    """

    def __init__(
        self,
        format: Format,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None = None,
        train_on: str | None = None,
    ):
        self._format, self._template, self._train_on = format, template, train_on
        self._masks = Masks(tokenizer, special=template is None)
        self._backend: Any = tokenizer.backend_tokenizer
        self._bos: Any = tokenizer.bos_token_id
        self._end: Any = tokenizer.eos_token_id
        self._edges = _plain(str(tokenizer.bos_token or "")), _plain(str(tokenizer.eos_token))
        self._wants_bos = wants_bos(tokenizer)
        self._adds_end = self._backend.encode("a", add_special_tokens=True).ids[-1] == self._end
        self._over_limit: list[int] = []  # of each row at which the template reached a limit: its steps

    def tokenize(self, prepared: Sequence[Prepared | Encoded]) -> Sequence[Prepared | Encoded]:
        """The second stage: all texts at once, in the tokenizers library, which needs no lock of the interpreter."""
        good = [each for each in prepared if isinstance(each, Prepared)]
        tokens = self._masks.tokens([each.text for each in good])
        prompts = list(dict.fromkeys(prompt for each in good for prompt in each.prompts))  # many are equal
        alone = dict(zip(prompts, self._masks.tokens(prompts), strict=True))
        for each, ids in zip(good, tokens, strict=True):
            each.ids, each.alone = ids, [alone[prompt] for prompt in each.prompts]
        return prepared

    def encode(self, tokenized: Sequence[Prepared | Encoded]) -> list[Encoded]:
        """The third stage: masks, and their proof; one result a row, in order."""
        encoded = [each if isinstance(each, Encoded) else self._masked(each) for each in tokenized]
        self._prove(encoded, tokenized)
        return encoded

    # ── before tokenizing ────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, row: Row) -> Prepared | Encoded:
        """The first stage: a row as text for the tokenizer. Errors are findings, not raised."""
        try:
            document = self._format.read(row)
            if document is None:
                return Encoded(row, None, (Finding("left_out"),))
            if isinstance(document, Conversation):
                return self._prepared_conversation(document)
            return self._prepared_completion(document)
        except LimitReached as error:  # of the template; too many such rows would take all day
            assert self._template is not None
            self._over_limit.append(self._template.compiled.steps)
            if len(self._over_limit) >= _MOST_OVER_LIMIT or sum(self._over_limit[1:]) >= limits.TEMPLATE_MOST_STEPS:
                raise
            return Encoded(row, None, (Finding("malformed", error),))
        except LoraError as error:
            kind = "not_prompted" if isinstance(error, NotPrompted) else "malformed"
            return Encoded(row, None, (Finding(kind, error),))

    def _prepared_completion(self, document: Completion) -> Prepared | Encoded:
        text = (document.prompt or "") + document.completion
        whole = document.prompt is None or self._train_on == "all"
        if not text.strip():
            what = "the text is empty" if document.prompt is None else "prompt and completion are empty"
            return refused(document, "empty", what, "remove the row")
        if not document.completion and not whole:
            return nothing_trained(document)
        prompts = [] if document.prompt is None else [document.prompt]
        return Prepared(document, text, prompts, [text if whole else document.completion])

    def _prepared_conversation(self, document: Conversation) -> Prepared | Encoded:
        says = [bool(turn["content"].strip() or turn.get("tool_calls")) for turn in document.turns]
        if not any(says):
            return refused(document, "empty", "every turn is empty", "remove the row")
        assert self._template is not None
        where, weights = document.row.where, document.weights
        wanted = [at for at, turn in enumerate(document.turns) if turn["role"] == "assistant"]
        if self._train_on == "all":
            if any(weights[at] != document.weight for at in wanted):
                fix = "write data.train_on: assistant, or remove train and weight"
                raise LoraError("train_on: all has no place for weights of turns", where=where, fix=fix)
            text = render_whole(self._template, document.turns, where, document.tools)
            return Prepared(document, text, [], [text])
        if self._train_on in ("last_assistant", "completion"):
            wanted = wanted[-1:]  # also where it says nothing: then there is nothing to train
        wanted = [at for at in wanted if weights[at] > 0 and says[at]]
        if not wanted:
            return nothing_trained(document)
        try:
            rendered = render_with_spans(self._template, document.turns, wanted, where, document.tools)
        except LimitReached:
            raise
        except LoraError:
            if found := special_in_text(document, self._template):  # which misleads the template
                return Encoded(document.row, None, (found,))
            raise
        ends = self._masks.prompt_ends(rendered.text, rendered.spans, self._template.special)
        trained = [rendered.text[span.start : span.end] for span in rendered.spans]
        return Prepared(document, rendered.text, ends, trained, rendered)

    # ── after tokenizing ────────────────────────────────────────────────────────────────────────────────────

    def _masked(self, each: Prepared) -> Encoded:
        document, notes = each.document, []
        found: list[Finding] = []
        proved = self._masks.spelled(each.ids, each.text) is not None
        if isinstance(document, Completion):
            ids, spans = self._completion(document, each)
            proved = proved and ids[: len(each.ids)] == each.ids
        else:
            ids, spans = each.ids, [(0, len(each.ids), document.weight)]
            if each.rendered is not None:
                turns, ends = each.rendered.spans, list(zip(each.prompts, each.alone, strict=True))
                placed = self._masks.place(each.text, ids, turns, ends)
                if placed is None:
                    what = "a trained turn has no tokens: the tokenizer drops its characters"
                    return refused(document, "not_round_trip", what, "remove the row")
                ids, proved = placed.ids, placed.proved
                spans = [(*at, document.weights[turn.turn]) for at, turn in zip(placed.spans, turns, strict=True)]
            ids, spans = self._with_bos(ids, spans)
            found, notes = self._findings(document, each.rendered, ids, spans)
        row = document.row
        if self._bos is not None and ids[:2] == [self._bos] * 2:
            found.append(problem(row, "double_bos", "two BOS tokens at the start", "remove the one in the text"))
        example = Example(ids, spans, row.file, row.number, row.line)
        if not example.targets:
            return nothing_trained(document)
        return Encoded(row, example, tuple(found), (*notes, *_worth_a_look(document, each.rendered)), proved)

    def _findings(
        self, document: Conversation, rendered: Rendered | None, ids: list[int], spans: Sequence[Span]
    ) -> tuple[list[Finding], list[str]]:
        """Problems of a conversation and of its trained turns, and notes."""
        assert self._template is not None
        special = special_in_text(document, self._template)
        found, notes = [] if special is None else [special], list(document.notes)
        if rendered is None:
            return found, notes
        for turn, (_, last, _) in zip(rendered.spans, spans, strict=True):
            if not turn.stopped or ids[last - 1] not in self._masks.special:
                token = str(self._backend.id_to_token(ids[last - 1])) if turn.stopped else None
                found.append(unstopped(document, self._template, turn.turn, token))
                break
        if rendered.two_forms is not None:
            found.append(Finding("two_forms", rendered.two_forms))
        if any(turn.empty_thoughts for turn in rendered.spans):
            notes.append("empty_thoughts")
        return found, notes + ["forgotten_thoughts"] * rendered.forgotten

    def _completion(self, document: Completion, each: Prepared) -> tuple[list[int], list[Span]]:
        """Prompt, completion and the end token; the prompt is tokenized as it will be on its own."""
        together, context = self._unended(each.ids), self._unended(each.alone[0]) if each.alone else []
        if together[: len(context)] == context:
            answer = together[len(context) :]
        else:  # a token would span the border: keep the prompt as the model will meet it
            answer = self._masks.continued(context, document.completion)
        ids = [*context, *answer]
        ids += [] if answer and answer[-1] == self._end else [self._end]
        return ids, [(0 if self._train_on == "all" else len(context), len(ids), document.weight)]

    def _with_bos(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """A template that writes no BOS, for a tokenizer that wants one: it is put in front."""
        if not self._wants_bos or ids[:1] == [self._bos]:
            return ids, spans
        return [self._bos, *ids], [(first + 1, last + 1, weight) for first, last, weight in spans]

    def _unended(self, ids: list[int]) -> list[int]:
        """Without the end token that some tokenizers add by themselves."""
        return ids[:-1] if self._adds_end and ids and ids[-1] == self._end else ids

    def _prove(self, encoded: list[Encoded], prepared: Sequence[Prepared | Encoded]) -> None:
        """Decodes what is trained and compares it with what was to be trained; a difference becomes a finding.

        That is done already where the bytes of all tokens are the text's own and each span's are the turn's.
        """
        checks: list[tuple[int, Any, str]] = []  # which row, tokens, what they are to spell
        for at, (source, each) in enumerate(zip(prepared, encoded, strict=True)):
            if isinstance(source, Encoded) or each.example is None or each.proved:
                continue
            whole = each.example.ids
            runs = [*(whole[first:last] for first, last, _ in each.example.spans), whole]
            texts = [*source.trained, source.text]  # what is not trained has to be there too
            checks += [(at, run, text) for run, text in zip(runs, texts, strict=True)]
        decoded = self._backend.decode_batch([run for _, run, _ in checks], skip_special_tokens=False)
        for (at, _, text), back in zip(checks, decoded, strict=True):
            each = encoded[at]
            known = any(found.kind == "not_round_trip" for found in each.findings)
            if not known and not self._spells(back, text):
                encoded[at] = replace(each, findings=(*each.findings, _lossy(each.row, text, back)))

    def _spells(self, back: str, text: str) -> bool:
        """Whether tokens give back a text, but for white space and Unicode's compatibility forms.

        A BOS in front and an end token at the end may have been added.
        """
        bos, end = self._edges
        wanted, plain = _plain(text), _plain(back)
        return any(plain == before + wanted + behind for before in ("", bos) for behind in ("", end))


def _worth_a_look(document: Document, rendered: Rendered | None) -> list[str]:
    """Notes on what exports leave in a row: no question, a placeholder as an answer that is trained, HTML entities."""
    if isinstance(document, Completion):
        texts = [document.prompt or "", document.completion]
        asked, answers = ([], []) if document.prompt is None else ([document.prompt], [document.completion])
    else:
        turns = document.turns
        trained = range(len(turns)) if rendered is None else [span.turn for span in rendered.spans]
        texts = [turn["content"] for turn in turns]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        answers = [texts[at] for at in trained if turns[at]["role"] == "assistant"]
    found = {
        "empty_question": any(not text.strip() for text in asked),
        "placeholder": any(text.strip().casefold() in _PLACEHOLDERS for text in answers),
        "entities": any(name in html5 or name[0] == "#" for text in texts for name in _ENTITY.findall(text)),
    }
    return [kind for kind, there in found.items() if there]


def _lossy(row: Row, text: str, back: str) -> Finding:
    lost = sorted(set(_plain(text)) - set(_plain(back)))
    what = f"the tokenizer cannot give back {' '.join(map(repr, lost[:5]))}" if lost else "the tokens spell other text"
    fix = "replace these characters, or use a model whose tokenizer has them"
    return problem(row, "not_round_trip", what, fix)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def target_bytes(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the target tokens spell; special tokens spell none."""
    total = 0
    for example in examples:
        for first, last, _ in example.spans:
            run = [int(token) for token in example.ids[max(first, 1) : last]]
            text: Any = tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            total += len(text.encode())
    return total
