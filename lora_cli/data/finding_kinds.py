"""What the checks can find in data: what each kind of finding means, whether it stops a run, and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Kind:
    """What a finding means. stops: whether it stops a run. fix: one line. one: the title for a single one of these."""

    title: str
    fix: str
    one: str = ""
    stops: ClassVar[bool] = True

    def counted(self, count: int) -> str:
        """Such as 2,000 empty rows, 1 empty row."""
        if count != 1:
            return f"{count:,} {self.title}"
        one = self.one or re.sub(r"(row|turn|file|token)s", r"\1", self.title, count=1)
        return f"1 {one}"


class Note(Kind):
    """What a person should know, and what does not stop a run."""

    stops = False


KINDS = {
    "malformed": Kind("rows that cannot be read", "correct or remove these rows"),
    "empty": Kind("empty rows", "remove these rows"),
    "no_target": Kind(
        "rows with no target token", "give them a completion or an assistant turn, or remove them (train: false)"
    ),
    "too_long": Kind("rows above max_seq_len", "raise data.max_seq_len, or set data.too_long: drop, truncate or split"),
    "no_stop_token": Kind(
        "trained turns without a stop token", "use data.template: alpaca or plain, or a template with stop tokens"
    ),
    "special_in_text": Kind(
        "conversations with a special token in their text",
        "remove or rewrite it; it would not be read as text",
        one="conversation with a special token in its text",
    ),
    "double_bos": Kind("rows with two BOS tokens", "remove the BOS from the text"),
    "not_round_trip": Kind(
        "rows with characters the tokenizer cannot give back", "replace these characters, or use another model"
    ),
    "overlap": Kind(
        "validation rows that are training rows too",
        "remove them from one side, or set validation: 0.05",
        one="validation row that is a training row too",
    ),
    "duplicate": Note(
        "rows that repeat an earlier row", "remove them if they are not intended", one="row that repeats an earlier row"
    ),
    "not_prompted": Kind(
        "turns where generation would begin in another place than training",
        "use a template whose generation prompt is the beginning of its turns",
    ),
    "two_forms": Kind(
        "turns that the template renders differently when they come last, as in generation",
        "write data.train_on: last_assistant, or data.allow: [two_forms] to train them as they are",
        one="turn that the template renders differently when it comes last, as in generation",
    ),
    "empty_question": Note(
        "rows with an empty question", "none needed if the model should answer nothing so; else write the questions"
    ),
    "placeholder": Note(
        "rows whose trained answer is a placeholder, such as N/A", "give them an answer, or remove these rows"
    ),
    "entities": Note(
        "rows with HTML entities such as &amp; in their text",
        "none needed where HTML is meant; else decode them",
        one="row with HTML entities such as &amp; in its text",
    ),
    "empty_thoughts": Note(
        "rows that train an empty think block",
        "none needed if the model should not think; else write the thinking into the rows",
        one="row that trains an empty think block",
    ),
    "forgotten_thoughts": Note(
        "earlier turns whose thinking the template leaves out, as at generation", "none needed if that is intended"
    ),
    "null_members": Note(
        "rows of a table with null members in tool calls, tools or tool results: left out",
        "none needed: tables fill them in; where a null is intended, keep arguments as JSON text, or use JSON Lines",
    ),
    "result_as_json": Note(
        "rows with a tool result that is not text: written as JSON",
        "none needed if the model will receive such results as JSON",
    ),
    "not_utf8": Note(
        "files whose text is not UTF-8", "none needed if it reads well in the preview; else save them as UTF-8"
    ),
    "left_out": Note("rows left out by train: false or weight: 0", "none needed if that is intended"),
    "stop_not_end": Note(
        "trained stop tokens at which the model does not stop by itself",
        "stop generation at that token, or use data.template: plain",
    ),
}
