"""Ten thousand random rows: each becomes a valid example or a finding that names it, and nothing else ever happens."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, family_tokenizer
from tiny_model import make_tokenizer
from tokenizers import normalizers

from lora_cli.data.example import windows
from lora_cli.data.files.readers import Row
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Encoded, Findings
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.recipe import DataRecipe

ROWS = 1250  # of each of the eight ways below

WORDS = [
    *(
        "",
        " ",
        "\n",
        "a",
        "How many?",
        "Four.",
        "select name from table",
        "0",
        "1e5",
        "null",
        "true",
        "[]",
        "{}",
        "[",
        "{",
    ),
    *('{"a": 1}', '["x"]', "\t\t", "  spaces  ", "\r\n", "\u2028", "\x00", "\x07\x1b[31m", "\ufeff", "\ue000\ue001"),
    *("Größe", "数学", "🙂👩‍👧", "e\u0301", "\u202eright to left", "ﬁ", "\ufffd", "x" * 300, "</s>", "<s>", "<unk>"),
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|eot_id|>", "<think>", "</think>", "<tool_call>"),
    *("[INST]", "[/INST]", "<bos>", "{{ messages }}", "{% raw %}", "%s", "<|user|>", "### Response:\n", "nan", "-1"),
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e-60,
        1e39,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *([], {}, [[]], [None], {"": ""}, ["a", 1], {"a": {"b": [1, None]}}, [[["deep"]]], '"\\ud83d"', "[" * 50_000),
]
ROLES = [
    *("user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "developer", "USER"),
    *("ipython", "narrator", "", " user", "assistant\n", None, 3, ["user"], {"role": "user"}),
]
KEYS = ["name", "tool_call_id", "reasoning_content", "reasoning", "train", "weight", "tool_calls", "role", "content"]
KEYS += ["from", "value", "id", "audio", ""]


class Maker:
    """Rows that are right more often than not, with anything at all in any place."""

    def __init__(self, seed: int):
        self.random = Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def text(self) -> str:
        return "".join(self.random.choice(WORDS) for _ in range(self.random.choice([0, 1, 1, 1, 2, 5])))

    def clean(self) -> str:
        return " ".join(
            self.random.choice(["How", "many", "are", "4", "ü", "?"]) for _ in range(self.random.randint(1, 6))
        )

    def said(self) -> Any:
        if self.chance(0.06):
            return self.any()
        return self.clean() if self.chance(0.8) else self.text()

    def any(self, depth: int = 0) -> Any:
        kind = self.random.randrange(8 if depth < 4 else 5)
        if kind < 3:
            return self.random.choice(ODD)
        if kind == 3:
            return self.random.uniform(-1, 1) * 10 ** self.random.randint(-9, 9)
        if kind == 4:
            return self.text()
        if kind == 5:
            return [self.any(depth + 1) for _ in range(self.random.randint(0, 3))]
        if kind == 6:
            return {
                self.random.choice([*KEYS, self.text()]): self.any(depth + 1) for _ in range(self.random.randint(0, 3))
            }
        return self.as_text(self.any(depth + 1))

    def as_text(self, value: Any) -> str:
        text = json.dumps(value)
        if self.chance(0.1):  # half of a character, as JSON can write it
            text = text.replace('": "', '": "\\ud83d', 1)
        return text[: self.random.randint(0, len(text))] if self.chance(0.1) else text

    def with_extras(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in ("train", "weight"):
            if self.chance(0.15):
                row[name] = self.random.choice([True, True, "true", False, 2, 0.5, "3", None, "", self.any()])
        if self.chance(0.1):
            row[self.text()] = self.any()
        if self.chance(0.06) and row:
            del row[self.random.choice(list(row))]
        if self.chance(0.05) and row:
            row[self.random.choice(list(row))] = self.any()
        return row

    def turn(self, role: str, names: tuple[str, str]) -> Any:
        if self.chance(0.01):
            return self.any()
        role_key, content_key = names
        turn: dict[str, Any] = {role_key: role, content_key: self.said()}
        if self.chance(0.02):
            turn[role_key] = self.random.choice(ROLES)
        if self.chance(0.04):
            turn[content_key] = [{"type": "text", "text": self.said()}, *([self.any()] if self.chance(0.3) else [])]
        if role == "assistant" and self.chance(0.08):
            turn["tool_calls"] = self.calls()
        if self.chance(0.04):
            turn[self.random.choice(KEYS)] = self.any() if self.chance(0.7) else self.text()
        if self.chance(0.01):
            del turn[self.random.choice(list(turn))]
        return turn

    def calls(self) -> Any:
        arguments: Any = {self.clean(): self.said()}
        arguments = self.random.choice([arguments, arguments, self.as_text(arguments), self.any()])
        call: Any = {"id": "abcdefghi", "type": "function", "function": {"name": "count", "arguments": arguments}}
        if self.chance(0.2):
            call = self.random.choice([call["function"], {"function": self.any()}, self.any()])
        return (
            [call] if self.chance(0.9) else self.random.choice([call, [call, call], self.as_text([call]), self.any()])
        )

    def conversation(self, names: tuple[str, str], speakers: tuple[str, str, str]) -> Any:
        system, user, assistant = speakers
        turns = [self.turn(system, names)] if self.chance(0.2) else []
        for _ in range(self.random.choice([0, 1, 1, 1, 2, 3])):
            turns += [self.turn(user, names), self.turn(assistant, names)]
        if self.chance(0.1):
            turns.append(self.turn(self.random.choice([user, assistant, "tool"]), names))
        if self.chance(0.04):
            self.random.shuffle(turns)
        return self.as_text(turns) if self.chance(0.1) else turns

    # ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────

    def of_text(self) -> dict[str, Any]:
        return self.with_extras({"text": self.said()})

    def of_completion(self) -> dict[str, Any]:
        return self.with_extras({"prompt": self.said(), "completion": self.said()})

    def of_instruction(self) -> dict[str, Any]:
        row = {"instruction": self.said(), "output": self.said()}
        for name in ("input", "system", "history"):
            if self.chance(0.2):
                row[name] = self.said()
        if self.chance(0.2):
            row["history"] = [[self.said(), self.said()] for _ in range(self.random.randint(0, 2))]
        return self.with_extras(row)

    def of_messages(self) -> dict[str, Any]:
        row = {"messages": self.conversation(("role", "content"), ("system", "user", "assistant"))}
        return self.with_extras(self.with_tools(row))

    def of_conversations(self) -> dict[str, Any]:
        row = {"conversations": self.conversation(("from", "value"), ("system", "human", "gpt"))}
        if self.chance(0.1):
            row["system"] = self.said()
        return self.with_extras(self.with_tools(row))

    def with_tools(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.chance(0.1):
            tool: Any = {"type": "function", "function": {"name": self.said(), "parameters": self.any()}}
            tools = [tool, *([self.any()] if self.chance(0.2) else [])]
            row["tools"] = self.random.choice([tools, tools, self.as_text(tools), self.any()])
        return row


def family(name: str) -> Callable[[], Any]:
    return lambda: family_tokenizer(FAMILIES[name])


def lowercasing() -> Any:
    """A tokenizer that loses what it is given: there are findings of examples too."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


WAYS: dict[str, tuple[Callable[[Maker], dict[str, Any]], Callable[[], Any], dict[str, Any]]] = {
    "text": (Maker.of_text, family("olmo-2"), {"format": "text"}),
    "completion": (Maker.of_completion, family("zephyr"), {"format": "completion"}),
    "completion, all": (Maker.of_completion, lowercasing, {"format": "completion", "train_on": "all"}),
    "instruction": (Maker.of_instruction, family("olmo-2"), {"format": "instruction", "template": "alpaca"}),
    "messages": (Maker.of_messages, family("qwen3"), {"format": "chat"}),
    "messages, last": (Maker.of_messages, family("llama-3.1"), {"format": "chat", "train_on": "last_assistant"}),
    "messages, all": (Maker.of_messages, family("deepseek-v3"), {"format": "chat", "train_on": "all"}),
    "conversations": (Maker.of_conversations, family("smollm2"), {"format": "chat", "template": "chatml"}),
}
HEADS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "completion": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "output": "b"},
    "messages": {"messages": []},
    "conversations": {"conversations": []},
}


def complaint(result: Encoded, row: Row, vocabulary: int) -> str | None:
    """What is wrong with an outcome; nothing if it is a valid example or a finding that names its row."""
    if result.row is not row:
        return "it is of another row"
    example = result.example
    for found in result.findings:
        if found.kind not in KINDS:
            return f"unknown kind {found.kind}"
        if found.kind != "left_out" and (found.error is None or found.error.where != row.where or not found.error.fix):
            return f"the finding {found.kind} does not name its row, or no fix: {found.error!r}"
    if any(note not in KINDS or KINDS[note].stops for note in result.notes):
        return f"notes {result.notes}"
    if example is None:
        return None if found is not None else "neither an example nor a finding"
    ids, spans = list(example.ids), list(example.spans)
    borders = [edge for first, last, _ in spans for edge in (first, last)]
    if (example.file, example.row) != (row.file, row.number):
        return "the example is of another row"
    if not all(isinstance(id, int) and 0 <= id < vocabulary for id in ids):
        return "ids outside of the vocabulary"
    if borders != sorted(borders) or not spans or borders[0] < 0 or borders[-1] > len(ids):
        return f"spans {spans} of {len(ids)} tokens"
    if any(first >= last for first, last, _ in spans):
        return f"an empty span in {spans}"
    if not all(0 < np.float32(weight) < np.inf for _, _, weight in spans):
        return f"weights that the loss cannot hold: {spans}"
    if example.targets <= 0 or not np.isfinite(np.float32(example.target_weight)) or not example.trained.any():
        return f"nothing to learn: {spans}"
    if sum(piece.targets for piece in windows(example, 16, 9)) != example.targets:
        return "windows of it have other targets"
    return None


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the weights that are complained about
@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_a_valid_example_or_a_finding_that_names_it(way):
    make, tokenizer_of, settings = WAYS[way]
    maker, tokenizer = Maker(sorted(WAYS).index(way)), tokenizer_of()
    rows = [Row("rows.jsonl", number, json.loads(json.dumps(make(maker)))) for number in range(1, ROWS + 1)]
    head = [Row("rows.jsonl", 1, HEADS[way.partition(",")[0]])]
    encoder = RowEncoder(DataRecipe.model_validate({"train": "rows.jsonl"} | settings), tokenizer, head)
    wrong: dict[str, str] = {}  # what → the first row with it
    kinds: Counter[str] = Counter()
    findings = Findings()
    for start in range(0, ROWS, 250):
        for row, result in outcomes(encoder, rows[start : start + 250], findings):
            what = result if isinstance(result, str) else complaint(result, row, len(tokenizer))
            if what is not None:
                wrong.setdefault(what[:80], f"{row.where}: {json.dumps(row.values)[:600]}")
            elif not isinstance(result, str):
                kinds.update([*([each.kind for each in result.findings] or ["example"]), *result.notes])
    assert not wrong, "\n".join(f"{what}\n    {row}" for what, row in wrong.items())
    counted = Counter(findings.counts)
    assert counted == Counter({kind: count for kind, count in kinds.items() if kind != "example"})
    assert kinds["example"] > ROWS / 5, kinds  # rows that are all refused would prove nothing
    assert kinds["malformed"] > ROWS / 50, kinds
    assert len(kinds) >= 3, kinds


def outcomes(encoder: RowEncoder, rows: list[Row], findings: Findings) -> list[tuple[Row, Encoded | str]]:
    """One result a row; where encoding raises, row by row, with the exception in the place of the result."""
    try:
        own = Findings()
        results: list[Encoded] = list(encoder.encode(iter(rows), own))
        assert len(results) == len(rows)
        for kind, count in own.counts.items():
            findings.counts[kind] = findings.counts.get(kind, 0) + count
        return list(zip(rows, results, strict=True))
    except Exception:  # whatever it is, it is what this test is looking for
        found: list[tuple[Row, Encoded | str]] = []
        for row in rows:
            try:
                found.append((row, next(encoder.encode(iter([row]), Findings()))))
            except Exception as error:
                found.append((row, f"raised {type(error).__name__}: {error}"))
        return found
