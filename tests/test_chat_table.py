"""Chat templates × conversations: each is trained exactly as it will be generated, or refused for a true reason.

What is right is found here from scratch, by transformers alone: the prompt is what apply_chat_template renders of what
came before, tokenized alone; the answer is what follows it in the conversation that ends with the turn, up to the token
at which the model stops. A row is right if the whole conversation shows each of its answers just so.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

import pytest
from chat_families import FAMILIES
from more_chat_families import MORE, tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lora_cli.data.chat.template import chat_template
from lora_cli.data.files.readers import Row
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Encoded, Findings
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.recipe import TEMPLATES, DataRecipe

Turns = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(*names: str, text: str = "", **more: Any) -> dict[str, Any]:
    made = [
        {"id": f"abcdefgh{at}", "type": "function", "function": {"name": name, "arguments": {"of": "Äpfel", "n": at}}}
        for at, name in enumerate(names)
    ]
    return says(text, tool_calls=made, **more)


def result(text: str, at: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"abcdefgh{at}", "name": "count"}


def thinks(text: str) -> dict[str, Any]:
    return says(f"<think>\nLet me see: {text.lower()}\n</think>\n\n{text}")


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": f"{name}s.", "parameters": {"type": "object", "properties": {}}},
    }
    for name in ("count", "weigh")
]
Q, A, Q2, A2 = user("How many?"), says("Four."), user("And now?"), says("Five,\n\nsince\tnoon.")

CONVERSATIONS: dict[str, Turns] = {
    "plain": [Q, A],
    "two answers": [Q, A, Q2, A2],
    "three answers": [Q, A, Q2, A2, user("Sure?"), says("Yes.")],
    "system": [SYSTEM, Q, A],
    "system, two answers": [SYSTEM, Q, A, Q2, A2],
    "call": [Q, calls("count"), result("4"), A],
    "call, then another question": [Q, calls("count"), result("4"), A, Q2, A2],
    "call and words": [Q, calls("count", text="Let me see."), result("4"), A],
    "calls at once": [Q, calls("count", "weigh"), result("4"), result("5", 1), A],
    "call at the end": [Q, calls("count")],
    "thoughts": [Q, thinks("Four.")],
    "thoughts twice": [Q, thinks("Four."), Q2, thinks("Five.")],
    "thoughts first": [Q, thinks("Four."), Q2, A2],
    "thoughts last": [Q, A, Q2, thinks("Five.")],
    "thoughts apart": [Q, says("Four.", reasoning_content="Let me see.")],
    "thoughts apart, and a call": [Q, calls("count", reasoning_content="Count."), result("4"), A],
    "empty answer first": [Q, says(""), Q2, A2],
    "empty answer last": [Q, A, Q2, says("")],
    "quoted": [Q, says('"Four", he said.'), Q2, says('["Five"]')],
    "line ends first": [Q, says("\n\nFour."), Q2, says("\nFive.")],
    "blanks first": [Q, says("    four()"), Q2, says("  5")],
    "blanks last": [Q, says("Four.  \n"), Q2, says("Five. ")],
    "question last": [Q, A, Q2],
    "two answers in a row": [Q, A, A2],
    "answer first": [A, Q, A2],
    "other scripts": [user("数える?"), says("数🙂 e\u0301 ﬁ."), user("Größe?"), says("½\u2028m")],
    "digits": [user("2 + 2"), says("4"), user("3 + 3"), says("6 - 0")],
    "a stop token in the text": [Q, says("It is {stop}.")],
    "very long": [each for at in range(8) for each in (user(f"{at}? " * 40), says(f"It is {at}. " * 30))],
}
assert len(CONVERSATIONS) >= 25


@dataclass(frozen=True)
class Cell:
    """What transformers makes of a conversation. right: spans of ids; else `why` not, by what kind of reason."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    why: str = ""
    words: str = ""


class Oracle:
    """A tokenizer and a template. stops: what may end an answer."""

    def __init__(self, tokenizer: Any, template: str, stops: tuple[str, ...], wants_bos: bool):
        self.tokenizer, self.template, self.stops, self.wants_bos = tokenizer, template, stops, wants_bos

    def render(self, turns: Turns, tools: Any, *, prompt: bool = False) -> str:
        words = {"chat_template": self.template, "tools": tools, "tokenize": False, "add_generation_prompt": prompt}
        try:
            text = self.tokenizer.apply_chat_template(turns, **words)
        except TypeError:  # some want arguments as text
            written = json.loads(json.dumps(turns))
            for turn in written:
                for call in turn.get("tool_calls", []):
                    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    call["function"]["arguments"] = arguments
            text = self.tokenizer.apply_chat_template(written, **words)
        return text.replace(datetime.now().strftime("%d %B %Y"), "26 July 2024")

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def cell(self, turns: Turns, tools: Any, last: bool) -> Cell:
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        if any(token in json.dumps(turns, ensure_ascii=False) for token in special):
            return Cell(why="special")
        spoken = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"][-1 if last else 0 :]
        wanted = [at for at in spoken if turns[at]["content"].strip() or "tool_calls" in turns[at]]
        if not wanted:
            return Cell(why="nothing")
        try:
            whole = self.render(turns, tools)
        except Exception as error:
            return Cell(why="raises", words=str(error))
        if tools and whole == self.render(turns, None):
            return Cell(why="leaves out")
        for turn in turns:
            if turn["role"] != "assistant" and squeezed(turn["content"]) not in squeezed(whole):
                return Cell(why="leaves out")
        places = []
        for at in wanted:
            if at == 0:
                return Cell(why="no prompt")
            try:
                prompt, alone = self.render(turns[:at], tools, prompt=True), self.render(turns[: at + 1], tools)
            except Exception as error:
                return Cell(why="raises", words=str(error))
            end = self._end(alone, len(prompt))
            said = squeezed(alone[len(prompt) : end])
            if not whole.startswith(prompt):
                return Cell(why="prompt")
            if end is None:
                return Cell(why="no stop")
            if not all(squeezed(part) in said for part in parts(turns[at])):
                return Cell(why="drops")
            if not whole.startswith(alone[:end]):
                return Cell(why="forms")
            places.append((len(prompt), end))
        return self._tokenized(whole, places)

    def _end(self, alone: str, start: int) -> int | None:
        """One behind the last stop that the conversation ends with; what follows it at the end is not the turn's."""
        found = [alone.rfind(stop) + len(stop) for stop in self.stops if alone.rfind(stop) >= start]
        return max(found) if found else None

    def _tokenized(self, whole: str, places: list[tuple[int, int]]) -> Cell:
        """Each prompt as it is alone, from the last stop on, which no token spans; then its answer."""
        ids: list[int] = []
        spans, done = [], 0
        if self.wants_bos and not whole.startswith(self.tokenizer.bos_token):
            ids = [self.tokenizer.bos_token_id]
        for start, end in places:
            stop = next((stop for stop in self.stops if whole.endswith(stop, 0, done)), "")
            prompt = self.tokens(whole[done - len(stop) : start])
            both = self.tokens(whole[done - len(stop) : end])
            answer = both[len(prompt) :] if both[: len(prompt)] == prompt else self.tokens(whole[start:end])
            ids += prompt[len(self.tokens(stop)) :] if stop else prompt
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
            done = end
        stop = next(stop for stop in self.stops if whole.endswith(stop, 0, done))
        return Cell(ids + self.tokens(whole[done - len(stop) :])[len(self.tokens(stop)) :], spans)


def parts(turn: dict[str, Any]) -> list[str]:
    return [
        turn["content"],
        turn.get("reasoning_content", ""),
        *(c["function"]["name"] for c in turn.get("tool_calls", [])),
    ]


def squeezed(text: str) -> str:
    return "".join(text.split())


TRUE = {  # reasons that may be given, by what the oracle finds; of several, any that holds
    "special": {"special_in_text"},
    "nothing": {"no_target", "empty"},
    "raises": {"malformed", "not_prompted"},
    "leaves out": {"malformed"},
    "no stop": {"no_stop_token"},
    "prompt": {"not_prompted", "malformed"},
    "drops": {"malformed"},
    "forms": {"two_forms", "malformed"},
}
WORDS = {
    "leaves out": ("leaves out", "no place for the tool call", "fails on"),
    "drops": ("drops a part", "no place for the tool call", "cannot be told apart"),
    "prompt": ("prompts a generation with", "cannot be told apart", "drops a part", "leaves out"),
}


def judged(encoded: Encoded, cell: Cell, where: str) -> str:
    """Right or refused; anything else fails."""
    if not encoded.findings:
        assert cell.why in ("", "no prompt"), f"{where}: trained, but {cell.why} {cell.words}"
        assert encoded.example is not None
        if cell.why:
            return "right"
        assert list(encoded.example.ids) == cell.ids, where
        assert [span[:2] for span in encoded.example.spans] == cell.spans, where
        return "right"
    kind, error = encoded.findings[0].kind, encoded.findings[0].error
    assert error is not None
    assert cell.why, f"{where}: refused with {error.what}"
    assert KINDS[kind].stops
    if cell.why == "no prompt":
        return "refused"
    assert kind in TRUE[cell.why], f"{where}: {kind}, but {cell.why}: {error.what}"
    assert any(word in error.what for word in WORDS.get(cell.why, ("",))), f"{where}: {cell.why}, but {error.what}"
    if cell.why == "raises" and kind == "malformed":
        assert cell.words in error.what or "drops" in error.what, f"{where}: {cell.words!r} is not in {error.what!r}"
    if (fix := error.fix or "").startswith("write data.train_on: last_assistant"):
        return "refused, last_assistant"
    return f"refused, {fix.split(':')[0] if fix.startswith('write data.') else 'other'}"


@cache
def encoder_of(tokenizer: Any, **settings: Any) -> RowEncoder:
    data = DataRecipe.model_validate({"train": "rows.jsonl"} | settings)
    return RowEncoder(data, tokenizer, [Row("rows.jsonl", 1, {"messages": [Q, A], "tools": None})])


def encode(tokenizer: Any, turns: Turns, tools: Any, **settings: Any) -> Encoded:
    row = Row("rows.jsonl", 1, {"messages": turns} | ({"tools": tools} if tools else {}))
    (encoded,) = encoder_of(tokenizer, **settings).encode(iter([row]), Findings())
    return encoded


OTHER_STOPS = {"harmony": ("<|return|>", "<|call|>"), "cohere": ("<|END_OF_TURN_TOKEN|>",)}
ALL = [*FAMILIES, *MORE]


def family_oracle(name: str) -> Oracle:
    family = FAMILIES.get(name) or MORE[name][0]
    tokenizer = tokenizer_of(name)
    return Oracle(tokenizer, tokenizer.chat_template, OTHER_STOPS.get(name, (family.turn_end,)), family.wants_bos)


def run_table(oracle: Oracle, name: str, **settings: Any) -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind, given in CONVERSATIONS.items():
        stop = oracle.stops[0]
        turns = [turn | {"content": turn["content"].replace("{stop}", stop)} for turn in given]
        tools = TOOLS if "call" in kind else None
        for last in (False, True):
            words = settings | ({"train_on": "last_assistant"} if last else {})
            cell = oracle.cell(turns, tools, last)
            encoded = encode(oracle.tokenizer, turns, tools, **words)
            verdict = judged(encoded, cell, f"{name}, {kind}, {'last' if last else 'all'}")
            if verdict.endswith("last_assistant"):
                assert not last, f"{name}, {kind}: its own fix"
                assert not encode(oracle.tokenizer, turns, tools, **words, train_on="last_assistant").findings
            counts[verdict] += 1
    return counts


@pytest.mark.parametrize("name", ALL)
def test_each_conversation_is_trained_as_it_is_generated_or_refused_for_a_true_reason(name, record_property):
    counts = run_table(family_oracle(name), name)
    record_property("cells", dict(counts))
    print(name, dict(counts))
    assert counts["right"] >= (0 if name == "deepseek-r1" else 10)


# ── built-in templates on tokenizers of other families ──────────────────────────────────────────────────────────

WORDS_OF_PIECES = ["How", "many", "Four", "And", "now", "Five", "User", "Assistant", "INST", "said", "It", "is"]


def pieces(*, prepend: str) -> Any:
    """As SentencePiece makes them: words with the blank before them, bytes for the rest, ids for `]"` and `:"`."""
    tokens = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -30.0) for byte in range(256))]
    tokens += [("▁", -3.0), *((chr(code), -9.0) for code in range(33, 127)), ("\n", -9.0), ("\n\n", -9.0)]
    tokens += [(f"▁{word}", -5.0) for word in WORDS_OF_PIECES] + [(each, -8.0) for each in (']"', ':"', "▁▁", "\n▁")]
    backend = Tokenizer(models.Unigram(tokens, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def merged(name: str) -> Any:
    """A family's tokenizer with `]"` and two line ends in one token each, as its large one has them."""
    tokenizer = tokenizer_of(name)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(backend["model"]["vocab"])  # added tokens come behind
    backend["model"]["vocab"] |= {']"': size, "ĊĊ": size + 1}
    for token in backend["added_tokens"]:
        token["id"] += 2
    if tokenizer.bos_token and backend["post_processor"]["type"] == "TemplateProcessing":
        backend["post_processor"]["special_tokens"][tokenizer.bos_token]["ids"][0] += 2
    backend["model"]["merges"] += [["]", '"'], ["Ċ", "Ċ"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


STRANGE = {
    "llama-3.1": lambda: merged("llama-3.1"),
    "qwen2.5": lambda: merged("qwen2.5"),
    "gemma-2": lambda: merged("gemma-2"),
    "pieces": lambda: pieces(prepend="always"),
    "pieces, first": lambda: pieces(prepend="first"),
    "pieces, never": lambda: pieces(prepend="never"),
}
STOPS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("which", STRANGE)
def test_built_in_templates_train_behind_the_prompt_that_other_programs_make_of_what_is_kept(which, template):
    """With the template that is kept with the adapter, by transformers alone; it writes the BOS that training has."""
    tokenizer = STRANGE[which]()
    stop = STOPS.get(template, tokenizer.eos_token)
    special_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = tokenizer.convert_tokens_to_ids(stop) in special_ids
    kept = chat_template(tokenizer, template).text
    counts: Counter[str] = Counter()
    for kind, turns in CONVERSATIONS.items():
        if "call" in kind or "stop token" in kind or kind == "very long":
            continue
        encoded = encode(tokenizer, turns, None, template=template)
        wanted = [at for at, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"].strip()]
        if encoded.findings:
            counts["refused"] += 1
            error = encoded.findings[0].error
            if encoded.findings[0].kind == "no_stop_token":
                assert not special
            elif "wants user and assistant in turn" not in error.what:
                assert "thoughts apart" in kind, error.what
                assert "drops a part of turn 2, its thinking" in error.what
            continue
        assert special
        ids = list(encoded.example.ids)
        if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id
        split = False
        for at, (first, last, _) in zip(wanted, encoded.example.spans, strict=True):
            if at:
                words = {"chat_template": kept, "tokenize": False}
                prompt = tokenizer.apply_chat_template(turns[:at], add_generation_prompt=True, **words)
                alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                begin = max((n for n, id in enumerate(alone) if id in special_ids), default=0)
                assert ids[first - len(alone) + begin : first] == alone[begin:], kind
                assert split or ids[:first] == alone, kind  # all of it, unless an answer before was tokenized apart
                whole = tokenizer.apply_chat_template(turns[: at + 1], **words)
                together = tokenizer(whole, add_special_tokens=False)["input_ids"]
                split = split or together[: len(alone)] != alone
            split = split or not at  # what it is prompted with is not known here
            text = tokenizer.decode(ids[:last])[len(tokenizer.decode(ids[:first])) :]
            assert text == turns[at]["content"] + stop or "pieces" in which, kind
            assert squeezed(text) == squeezed(turns[at]["content"] + stop), kind
        counts["split" if split else "right"] += 1
    print(template, "on", which, dict(counts))
    assert counts["split"] + counts["right"] >= 10 or not special
    if template == "mistral" and special:
        assert counts["split"] >= 1  # a quotation mark behind [/INST]
