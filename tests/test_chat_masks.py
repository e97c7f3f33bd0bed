"""Masks: what is trained decodes to the answers as the template writes them, each with its stop token, and no more.

The references are transformers' own rendering and tokenization, and what the answers are by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from chat_families import FAMILIES, family_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lora_cli.data.batches import collate
from lora_cli.data.chat.template import ChatTemplate
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.gate import Encoded, Findings
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.recipe import TEMPLATES, Allowed, DataRecipe

Turns = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, ANSWERED = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}
AGAIN, FIVE = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Five,\n\nsince\tnoon."}
TURNS = [ASKED, ANSWERED, AGAIN, FIVE]
SHAPES = {"single": TURNS[:2], "multi": TURNS, "asked last": TURNS[:3], "system": [SYSTEM, *TURNS]}
TOOL = {
    "type": "function",
    "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "count", "arguments": {"of": "Äpfel"}}}
TOOL_TURNS = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"},
    ANSWERED,
]


@dataclass(frozen=True)
class Case:
    """A template with a tokenizer. template: a built-in one by name, or None for the tokenizer's own."""

    family: str
    template: str | None
    stop: str

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.family)

    @property
    def jinja(self) -> str:
        if self.template is None:
            return self.tokenizer.chat_template
        from importlib import resources

        return (resources.files("lora_cli.data") / "templates" / f"{self.template}.jinja").read_text(encoding="utf-8")

    @property
    def system(self) -> bool:
        return self.template is not None or (FAMILIES[self.family].system and self.family != "mistral-v0.3")

    def rendered(self, turns: Turns, *, prompt: bool = False, tools: Any = None) -> str:
        """By transformers; the date of today becomes the one that prepared data always has."""
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.jinja, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return text.replace(*self.dates)

    @property
    def dates(self) -> tuple[str, str]:
        return datetime.now().strftime("%d %B %Y"), "26 July 2024"

    def encode(self, turns: Turns, **settings: Any) -> Encoded:
        return encode({"messages": turns}, self.tokenizer, template=self.template, **settings)

    def example(self, turns: Turns, **settings: Any) -> Example:
        encoded = self.encode(turns, **settings)
        if self == OWN["qwen3"] and len(turns) > 2 and settings.get("train_on") != "last_assistant":
            return allowed(encoded, "two_forms")  # earlier answers have no think block, as the last one has
        return example_of(encoded)


@cache
def tokenizer_of(family: str) -> Any:
    return make_tokenizer() if family == "tiny" else family_tokenizer(FAMILIES[family])


OWN = {name: Case(name, None, family.turn_end) for name, family in FAMILIES.items()}
BUILT_IN = {
    f"{template} on {family}": Case(family, template, stop)
    for template, family, stop in (
        *[("chatml", "qwen2.5", "<|im_end|>"), ("chatml", "smollm2", "<|im_end|>"), ("chatml", "tiny", "<|im_end|>")],
        *[("llama-3", "llama-3.1", "<|eot_id|>"), ("mistral", "mistral-v0.3", "</s>"), ("mistral", "zephyr", "</s>")],
        *[("gemma", "gemma-2", "<end_of_turn>"), ("gemma", "gemma-3", "<end_of_turn>"), ("alpaca", "zephyr", "</s>")],
        *[("alpaca", "olmo-2", "<|endoftext|>"), ("alpaca", "tulu-3", "<|end_of_text|>"), ("plain", "zephyr", "</s>")],
        *[("plain", "tulu-3", "<|end_of_text|>"), ("plain", "deepseek-v3", "<｜end▁of▁sentence｜>")],
        *[("plain", "tiny", "<|endoftext|>"), ("plain", "phi-3", "<|endoftext|>")],
    )
}
# R1's template opens a think block that it never shows again: what it renders is not what it prompts.
CASES = {name: case for name, case in OWN.items() if name != "deepseek-r1"} | BUILT_IN


@cache
def encoder_of(tokenizer: Any, columns: frozenset[str], words: frozenset[tuple[str, Any]]) -> RowEncoder:
    """Made once, since compiling a template takes longer than all the rest."""
    data = DataRecipe.model_validate({"train": "rows.jsonl"} | dict(words))
    return RowEncoder(data, tokenizer, [Row("rows.jsonl", 1, dict.fromkeys(columns))])


def encode(values: dict[str, Any], tokenizer: Any, **settings: Any) -> Encoded:
    row, findings = Row("rows.jsonl", 7, values), Findings()
    encoder = encoder_of(tokenizer, frozenset(values), frozenset(settings.items()))
    (encoded,) = encoder.encode(iter([row]), findings)
    assert findings.counts == Counter([*encoded.notes, *(found.kind for found in encoded.findings)])
    return encoded


def example_of(encoded: Encoded) -> Example:
    assert not encoded.findings, encoded.findings
    assert encoded.example is not None
    assert encoded.example.targets > 0
    return encoded.example


def allowed(encoded: Encoded, kind: str) -> Example:
    """The example of a row whose one finding the recipe may allow."""
    if encoded.findings:
        assert encoded.findings[0].kind == kind
        assert kind in get_args(Allowed)
    assert encoded.example is not None
    return encoded.example


def refusal(encoded: Encoded) -> tuple[str, str]:
    """The kind of finding and what it says, of a row that stops a run; it has no example unless that can be allowed."""
    assert encoded.findings, "accepted"
    assert KINDS[encoded.findings[0].kind].stops
    assert encoded.example is None or encoded.findings[0].kind in get_args(Allowed)
    assert encoded.findings[0].error is not None
    assert encoded.findings[0].error.where == "rows.jsonl: row 7"
    assert encoded.findings[0].error.fix
    return encoded.findings[0].kind, encoded.findings[0].error.what


def trained(example: Example, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.ids[first:last]) for first, last, _ in example.spans]


def text_of(ids: Any, tokenizer: Any) -> str:
    return tokenizer.decode([int(id) for id in ids])


# ── every template ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_template_is_tested():
    assert {case.family for case in OWN.values()} == set(FAMILIES)
    assert {case.template for case in BUILT_IN.values()} == set(TEMPLATES)


def answers_of(case: Case, turns: Turns) -> list[str]:
    """What is to be trained, by hand: answer and stop token, and what a template writes between prompt and answer."""
    answers = [turn["content"] + case.stop for turn in turns if turn["role"] == "assistant"]
    if case == OWN["mistral-v0.3"]:
        answers = [" " + answer for answer in answers]
    if case == OWN["qwen3"] and turns[-1]["role"] == "assistant":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
    return answers


def whole_text(case: Case, turns: Turns, **words: Any) -> str:
    """As the tokens of the conversation spell it: with a BOS if the tokenizer wants one and the template has none."""
    text, tokenizer = case.rendered(turns, **words), case.tokenizer
    if FAMILIES.get(case.family) and FAMILIES[case.family].wants_bos and not text.startswith(tokenizer.bos_token):
        text = tokenizer.bos_token + text
    if case.family == "phi-3":  # these tokens swallow the white space after them
        text = re.sub(r"(<\|(?:system|user|assistant|end)\|>)\s+", r"\1", text)
    return text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_each_answer_is_trained_with_its_stop_token_and_nothing_else_is(name, shape):
    case, turns = CASES[name], SHAPES[shape]
    if shape == "system" and not case.system:
        kind, what = refusal(case.encode(turns))
        assert kind == "malformed"
        assert "System role not supported" in what or "leaves out turn 1, by system" in what
        return
    tokenizer, answers, text = case.tokenizer, answers_of(case, turns), whole_text(case, turns)
    example = case.example(turns)
    assert trained(example, tokenizer) == answers
    assert text_of(example.ids, tokenizer) == text
    untrained = text
    for answer in answers:
        before, found, behind = untrained.partition(answer)
        assert found, answer
        untrained = before + behind
    assert text_of(np.asarray(example.ids)[~example.trained], tokenizer) == untrained
    stop = tokenizer.convert_tokens_to_ids(case.stop)
    assert [example.ids[last - 1] for _, last, _ in example.spans] == [stop] * len(answers)
    assert example.targets == sum(last - first for first, last, _ in example.spans)


@pytest.mark.parametrize("name", CASES)
def test_a_tokenizer_that_wants_a_bos_gets_exactly_one(name):
    case = CASES[name]
    family = FAMILIES.get(case.family)
    for turns in (SHAPES["single"], SHAPES["multi"]):
        for words in ({}, {"train_on": "all"}):
            ids, text = list(case.example(turns, **words).ids), case.rendered(turns)
            bos = family.bos if family else None
            if family and family.wants_bos:
                assert ids.count(case.tokenizer.bos_token_id) == 1
                assert ids[0] == case.tokenizer.bos_token_id
            elif bos:
                assert ids.count(case.tokenizer.bos_token_id) == text.count(bos)
            plain = case.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids in (plain, [case.tokenizer.bos_token_id, *plain])


@pytest.mark.parametrize("name", CASES)
def test_train_on_says_which_turns_carry_loss(name):
    case = CASES[name]
    answers = answers_of(case, TURNS)
    every = case.example(TURNS, train_on="assistant")
    assert every == case.example(TURNS)
    assert trained(case.example(TURNS, train_on="last_assistant"), case.tokenizer) == answers[-1:]
    whole = case.example(TURNS, train_on="all")
    assert whole.targets == whole.target_weight == len(whole.ids) - 1
    assert text_of(whole.ids, case.tokenizer) == whole_text(case, TURNS)
    for words in ({"train_on": "last_assistant"}, {"train_on": "all"}):
        assert list(case.example(TURNS, **words).ids) == list(every.ids)


@pytest.mark.parametrize("name", CASES)
def test_turns_can_be_left_untrained_and_weighted(name):
    case = CASES[name]
    answers = answers_of(case, TURNS)
    without = case.example([ASKED, ANSWERED | {"train": False}, AGAIN, FIVE])
    assert trained(without, case.tokenizer) == answers[1:]
    assert list(without.ids) == list(case.example(TURNS).ids)
    weighted = case.example([ASKED, ANSWERED | {"weight": 0.5}, AGAIN, FIVE | {"weight": 3}])
    assert [weight for _, _, weight in weighted.spans] == [0.5, 3]
    assert trained(weighted, case.tokenizer) == answers
    none = [ASKED, ANSWERED | {"train": False}, AGAIN, FIVE | {"weight": 0}]
    assert refusal(case.encode(none))[0] == "no_target"
    last = [ASKED, ANSWERED, AGAIN, FIVE | {"train": False}]
    assert refusal(case.encode(last, train_on="last_assistant"))[0] == "no_target"


@pytest.mark.parametrize("name", CASES)
def test_conversations_without_an_answer_are_refused(name):
    case = CASES[name]
    assert refusal(case.encode([ASKED]))[0] == "no_target"
    assert refusal(case.encode([ASKED, {"role": "assistant", "content": " \n"}]))[0] in ("no_target", "malformed")
    assert refusal(case.encode([ASKED | {"content": ""}, ANSWERED | {"content": " "}]))[0] == "empty"


@pytest.mark.parametrize("name", CASES)
def test_an_empty_answer_on_the_way_is_context_and_changes_no_other(name):
    case = CASES[name]
    turns = [ASKED, ANSWERED, AGAIN, ANSWERED | {"content": ""}, ASKED, FIVE]
    encoded = case.encode(turns)
    example = allowed(encoded, "two_forms" if name == "qwen3" else "")
    assert trained(example, case.tokenizer) == answers_of(case, [ANSWERED, FIVE])


DEFAULTS = {  # what these templates say in the place of a system turn
    "qwen2.5": "You are Qwen",
    "smollm2": "named SmolLM",
    "smollm3": "Think step by step",
    "llama-3.1": "Cutting Knowledge Date",
    "alpaca on zephyr": "Below is an instruction",
}


CALLERS = ("qwen2.5", "llama-3.1")


@pytest.mark.parametrize(
    ("name", "called"), [*((name, False) for name in DEFAULTS), *((name, True) for name in CALLERS)]
)
@pytest.mark.parametrize("opening", [[], [ANSWERED]], ids=["asked first", "answered first"])
def test_default_system_prompts_are_not_trained(name, opening, called):
    """Also where the assistant speaks first, and where marks in its turns would disturb the template."""
    case = CASES[name]
    turns = [*opening, *TURNS]
    if called:
        turns = [TOOL_TURNS[1], *turns] if opening else [*turns, *TOOL_TURNS]
    example = case.example(turns)
    assert DEFAULTS[name] in text_of(example.ids, case.tokenizer)
    everything = text_of(np.asarray(example.ids)[example.trained], case.tokenizer)
    assert DEFAULTS[name] not in everything
    assert "assistant" not in everything  # nor the prompt


JINJA = {
    "indented blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n    {% else %}\n"
    "{{ m.content }}<|im_end|>\n    {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'Äpfel <b> &' | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "variables": "{{ tools is none }}{{ documents is defined }}{{ add_generation_prompt }}{{ nothing is defined }}"
    "{{ bos_token is defined }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "undefined": "{{ messages[0].nothing }}{{ nothing }}{% if messages[0].tool_calls %}x{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "filters": "{{ messages | map(attribute='role') | list }}{{ messages[-1].content | trim | upper | length }}",
    "date": "{{ strftime_now('%d %B %Y') }}",
}


@pytest.mark.parametrize("which", JINJA)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_are_rendered_as_transformers_renders_them(which, prompt):
    tokenizer = with_template(JINJA[which])
    case = Case("tiny", None, "")
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
    own = ChatTemplate(JINJA[which], tokenizer, "own")
    assert own.render(TURNS, "row", generation_prompt=prompt) == text.replace(*case.dates)


# ── a second way to the same mask ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("turns", [TURNS[:2], TURNS], ids=["single", "multi"])
@pytest.mark.parametrize("name", CASES)
def test_the_last_answer_starts_where_the_tokens_of_its_prompt_end(name, turns):
    """By transformers alone: the prompt it would generate from against the whole conversation, both tokenized."""
    case = CASES[name]
    tokenizer, example = case.tokenizer, case.example(turns, train_on="last_assistant")
    prompt, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (case.rendered(turns[:-1], prompt=True), case.rendered(turns))
    )
    shift = len(example.ids) - len(whole)
    assert shift in (0, 1)
    assert whole[: len(prompt)] == prompt
    stop = whole.index(tokenizer.convert_tokens_to_ids(case.stop), len(prompt))
    assert example.spans == [(len(prompt) + shift, stop + 1 + shift, 1.0)]


@pytest.mark.parametrize("turns", [TURNS[:2], TURNS, TURNS[:3], [SYSTEM, *TURNS]], ids=len)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
def test_r1_is_prompted_to_think_so_answers_without_are_refused(turns, train_on):
    encoded = OWN["deepseek-r1"].encode(turns, train_on=train_on)
    kind, what = refusal(encoded)
    assert kind == "not_prompted"
    assert r"'<｜Assistant｜><think>\n'" in what
    assert encoded.example is None
    assert encoded.findings[0].error.fix.startswith("write data.template: ")
    template = encoded.findings[0].error.fix.split()[2].rstrip(",")
    assert example_of(encode({"messages": turns}, tokenizer_of("deepseek-r1"), template=template)).targets


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), min_size=2, max_size=6))
def test_tulus_generation_marks_say_the_same(contents):
    case = OWN["tulu-3"]
    contents = [f"a{content}b" for content in contents]
    turns = [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(contents)]
    marked = case.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    example = case.example(turns)
    assert list(example.ids[1:]) == marked["input_ids"]  # BOS in front, which the template lacks
    assert example.trained[1:].tolist() == [bool(on) for on in marked["assistant_masks"]]


PIECES = [
    *(" ", "  ", "     ", "\n", "\n\n", "\n \n", "\t", "\r\n", "\xa0", "\u2028", "a", "How many", "é", "e\u0301", "数"),
    *("🙂", "👩‍👧", "<", "|", "|>", "[", "{{", "%}", "-", "1", "</", "`", "\u200b", "\ue000"),
]
contents = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=9).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
)
TRIED = ["llama-3.1", "qwen2.5", "qwen3", "gemma-2", "gemma-3", "mistral-v0.3", "phi-3", "smollm2", "deepseek-v3"]
TRIED += ["olmo-2", "zephyr", "smollm3", "chatml on qwen2.5", "mistral on zephyr", "alpaca on tulu-3", "plain on tiny"]


def tokens_by_transformers(case: Case, turns: Turns) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each answer that says something its span: what its prompt is alone, then the answer with its stop.

    The text is cut behind stop tokens, which no token spans; a piece begins with the one before it.
    """

    def tokens(text: str) -> list[int]:
        return case.tokenizer(text, add_special_tokens=False)["input_ids"]

    whole, ids, spans, done = case.rendered(turns), [], [], 0
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant" or not turn["content"].strip():
            continue
        before = case.rendered(turns[:at], prompt=True)
        assert whole.startswith(before)
        end = whole.index(case.stop, len(before)) + len(case.stop)
        prompt, both = tokens(whole[done : len(before)]), tokens(whole[done:end])
        answer = both[len(prompt) :] if both[: len(prompt)] == prompt else tokens(whole[len(before) : end])
        ids = ids[: len(ids) - (done > 0)] + prompt
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
        done = end - len(case.stop)
    return ids[:-1] + tokens(whole[done:]), spans


@pytest.mark.parametrize("name", TRIED)
@settings(deadline=None, max_examples=50)
@given(said=st.lists(contents, min_size=2, max_size=5))
def test_any_contents_are_trained_as_transformers_would_prompt_and_continue_them(name, said):
    case = CASES[name]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    if all(not turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        return
    example = case.example(turns)
    whole = whole_text(case, turns)
    if case.family != "phi-3":
        assert text_of(example.ids, case.tokenizer) == whole
    ids, spans = tokens_by_transformers(case, turns)
    shift = len(example.ids) - len(ids)
    assert list(example.ids[shift:]) == ids
    assert shift == (1 if whole != case.rendered(turns) and case.family != "phi-3" else 0)
    assert example.spans == [(first + shift, last + shift, 1.0) for first, last in spans]
    for run, turn in zip(
        trained(example, case.tokenizer),
        [turn for turn in turns if turn["role"] == "assistant" and turn["content"].strip()],
        strict=True,
    ):
        assert run.endswith(case.stop)
        assert turn["content"].strip() in run


@pytest.mark.parametrize("answer", ["数", "42", "🙂!", "\n", "(", "Hi"])
def test_white_space_that_a_template_writes_before_the_answer_is_trained(answer):
    """Mistral's template prompts with [/INST]: the space behind it has to be generated."""
    case = OWN["mistral-v0.3"]
    turns = [ASKED, {"role": "assistant", "content": f"{answer} it is."}]
    (run,) = trained(case.example(turns), case.tokenizer)
    assert run == f" {turns[1]['content'].strip()}</s>"


@pytest.mark.parametrize("name", ["deepseek-v3", "mistral on zephyr"])
def test_white_space_at_the_start_of_an_answer_is_trained_also_where_nothing_prompts(name):
    case = CASES[name]
    (run,) = trained(case.example([ASKED, {"role": "assistant", "content": "    indented"}]), case.tokenizer)
    assert run == f"    indented{case.stop}"


# ── thoughts ────────────────────────────────────────────────────────────────────────────────────────────────────


def thinking(answer: str, *, apart: bool = False) -> dict[str, Any]:
    if apart:
        return {"role": "assistant", "content": answer, "reasoning_content": "Let me see."}
    return {"role": "assistant", "content": f"<think>\nLet me see.\n</think>\n\n{answer}"}


@pytest.mark.parametrize("apart", [False, True])
def test_qwen3_keeps_only_the_last_thoughts_so_only_the_last_turn_can_be_trained(apart):
    case = OWN["qwen3"]
    turns = [ASKED, thinking("Four.", apart=apart), AGAIN, thinking("Five.", apart=apart)]
    kind, what = refusal(case.encode(turns))
    assert kind == "malformed"
    assert "drops a part of turn 2" in what or "turn 2 cannot be told apart" in what
    assert "train_on: last_assistant" in str(case.encode(turns).findings)
    last = case.example(turns, train_on="last_assistant")
    assert trained(last, case.tokenizer) == ["<think>\nLet me see.\n</think>\n\nFive.<|im_end|>"]
    assert text_of(last.ids, case.tokenizer) == case.rendered(turns)
    single = case.example(turns[:2])
    assert trained(single, case.tokenizer) == ["<think>\nLet me see.\n</think>\n\nFour.<|im_end|>"]


def test_qwen3_takes_a_last_answer_with_thoughts_behind_one_without():
    case = OWN["qwen3"]
    turns = [ASKED, ANSWERED, AGAIN, thinking("Five.")]
    expected = ["Four.<|im_end|>", "<think>\nLet me see.\n</think>\n\nFive.<|im_end|>"]
    assert trained(allowed(case.encode(turns), "two_forms"), case.tokenizer) == expected


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
@pytest.mark.parametrize("count", [2, 4])
def test_r1_drops_all_thoughts_so_they_cannot_be_trained(train_on, count):
    turns = [ASKED, thinking("Four."), AGAIN, thinking("Five.")][:count]
    encoded = OWN["deepseek-r1"].encode(turns, train_on=train_on)
    kind, what = refusal(encoded)
    assert kind == "malformed"
    assert f"turn {count if train_on == 'last_assistant' else 2}" in what
    # the last turn alone is no way out: here it is what is refused
    assert train_on == "assistant" or "last_assistant" not in str(encoded.findings)


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2", "zephyr", "smollm2", "tulu-3"])
def test_thoughts_apart_are_refused_by_templates_that_know_nothing_of_them(name):
    assert "drops a part of turn 2" in refusal(OWN[name].encode([ASKED, thinking("Four.", apart=True)]))[1]


@pytest.mark.parametrize("name", ["smollm3", "llama-3.1", "qwen2.5", "zephyr", "mistral-v0.3"])
def test_thoughts_in_the_text_are_trained_where_the_template_keeps_them(name):
    case = OWN[name]
    turns = [ASKED, thinking("Four."), AGAIN, thinking("Five.")]
    assert trained(case.example(turns), case.tokenizer) == answers_of(case, turns)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("name", ["qwen3", "zephyr"])
def test_thoughts_that_are_no_text_are_refused(name, key, value):
    assert refusal(OWN[name].encode([ASKED, ANSWERED | {key: value}]))[0] == "malformed"


# ── what a template would lose ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asked", ["How many?", "What does 'Be brief.' mean?"])
@pytest.mark.parametrize("settings", [{}, {"train_on": "all"}])
def test_a_system_turn_that_the_template_leaves_out_is_missed_also_if_another_says_the_same(asked, settings):
    """Mistral's template writes it into the last turn, and only if that is the user's."""
    turns = [SYSTEM, {"role": "user", "content": asked}, ANSWERED]
    case = OWN["mistral-v0.3"]
    assert case.rendered(turns) == case.rendered(turns[1:])
    kind, what = refusal(case.encode(turns, **settings))
    assert kind == "malformed"
    assert "leaves out turn 1, by system" in what


def test_phi_leaves_out_roles_it_does_not_know():
    turns = [ASKED, ANSWERED, {"role": "tool", "content": "A result."}, FIVE]
    assert "leaves out turn 3, by tool" in refusal(OWN["phi-3"].encode(turns))[1]


NO_TOOLS = [name for name, family in FAMILIES.items() if not family.tools and name != "smollm3"]


@pytest.mark.parametrize("name", NO_TOOLS)
def test_tools_that_the_template_leaves_out_are_missed(name):
    case = OWN[name]
    assert case.rendered(TURNS, tools=[TOOL]) == case.rendered(TURNS)
    for turns in (TURNS, [{"role": "user", "content": "count them"}, *TURNS[1:]]):
        encoded = encode({"messages": turns, "tools": [TOOL]}, case.tokenizer)
        assert refusal(encoded) == ("malformed", "the chat template (the model's own) leaves out the tools")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1"])
@pytest.mark.parametrize("settings", [{}, {"train_on": "last_assistant"}, {"train_on": "all"}])
def test_tools_that_the_template_leaves_out_are_missed_also_if_one_is_called(name, settings):
    """A call names its tool too: that its name stands somewhere does not prove that the tools were listed."""
    assert refusal(encode({"messages": TOOL_TURNS, "tools": [TOOL]}, tokenizer_of(name), **settings))[0] == "malformed"


def with_text_arguments(turns: Turns) -> Turns:
    call = CALL | {"function": CALL["function"] | {"arguments": '{"of": "Äpfel"}'}}
    return [turn | {"tool_calls": [call]} if "tool_calls" in turn else turn for turn in turns]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1", '{"name": "count", "parameters": {"of": "Äpfel"}}<|eot_id|>'),
        ("qwen2.5", '<tool_call>\n{"name": "count", "arguments": {"of": "Äpfel"}}\n</tool_call><|im_end|>'),
        ("mistral-v0.3", '[TOOL_CALLS] [{"name": "count", "arguments": {"of": "Äpfel"}, "id": "abcdefghi"}]</s>'),
        (
            "deepseek-v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>count\n"
            '```json\n{"of": "Äpfel"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        ),
        ("chatml on qwen2.5", '<tool_call>\n{"name": "count", "arguments": {"of": "Äpfel"}}\n</tool_call><|im_end|>'),
        ("llama-3 on llama-3.1", '{"name": "count", "parameters": {"of": "Äpfel"}}<|eot_id|>'),
    ],
)
@pytest.mark.parametrize("written", [list, with_text_arguments], ids=["values", "text"])
def test_calls_are_trained_with_their_stop_token_alone_and_results_are_not(name, expected, written):
    case = CASES[name]
    tools = None if name == "deepseek-v3" else [TOOL]
    example = example_of(
        encode({"messages": written(TOOL_TURNS), "tools": tools}, case.tokenizer, template=case.template)
    )
    assert trained(example, case.tokenizer) == [expected, answers_of(case, [ANSWERED])[0]]
    text = case.rendered(with_text_arguments(TOOL_TURNS) if name == "deepseek-v3" else TOOL_TURNS, tools=tools)
    assert text_of(example.ids, case.tokenizer) == text


def test_calls_of_qwen3_are_trained_where_thoughts_make_them_sure():
    """Without thoughts it would render the call in another way at the end of a conversation."""
    case = OWN["qwen3"]
    call = TOOL_TURNS[1] | {"reasoning_content": "I must count."}
    turns = [ASKED, call, TOOL_TURNS[2], ANSWERED]
    example = allowed(encode({"messages": turns, "tools": [TOOL]}, case.tokenizer), "two_forms")
    assert trained(example, case.tokenizer) == [
        '<think>\nI must count.\n</think>\n\n<tool_call>\n{"name": "count", "arguments": {"of": "Äpfel"}}\n'
        "</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nFour.<|im_end|>",
    ]
    assert text_of(example.ids, case.tokenizer) == case.rendered(turns, tools=[TOOL])


def test_calls_of_qwen3_without_thoughts_are_trained_exactly_or_refused():
    case = OWN["qwen3"]
    encoded = encode({"messages": TOOL_TURNS, "tools": [TOOL]}, case.tokenizer)
    if encoded.example is not None:
        call = '<tool_call>\n{"name": "count", "arguments": {"of": "Äpfel"}}\n</tool_call><|im_end|>'
        last = "<think>\n\n</think>\n\nFour.<|im_end|>"
        assert trained(encoded.example, case.tokenizer) == [call, last]
    else:
        assert "turn 2" in refusal(encoded)[1]
    last = encode({"messages": TOOL_TURNS, "tools": [TOOL]}, case.tokenizer, train_on="last_assistant")
    assert trained(example_of(last), case.tokenizer) == ["<think>\n\n</think>\n\nFour.<|im_end|>"]


def test_what_is_said_beside_a_call_is_trained_or_its_loss_noticed():
    beside = TOOL_TURNS[1] | {"content": "Let me see."}
    turns = [ASKED, beside, *TOOL_TURNS[2:]]
    assert "drops a part of turn 2" in refusal(OWN["llama-3.1"].encode(turns))[1]
    (call, _) = trained(OWN["qwen2.5"].example(turns), OWN["qwen2.5"].tokenizer)
    assert call.startswith("Let me see.\n<tool_call>")
    assert "refuses this conversation" in refusal(OWN["zephyr"].encode(turns))[1] or "leaves out" in str(
        OWN["zephyr"].encode(turns).findings
    )


@pytest.mark.parametrize("tools", [[{"function": "count"}], [{"function": ["a"]}], [{"function": 7, "name": "count"}]])
def test_tools_whose_function_is_no_object_are_refused(tools):
    encoded = encode({"messages": TURNS, "tools": tools}, tokenizer_of("qwen2.5"))
    assert refusal(encoded)[0] == "malformed"


# ── stop tokens, special tokens, BOS ────────────────────────────────────────────────────────────────────────────


def with_template(template: str, tokenizer: Any = None) -> Any:
    copy = (tokenizer or make_tokenizer()).__class__(
        tokenizer_object=Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    copy.chat_template = template
    return copy


NO_STOP = {
    "plain words": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "before": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}",
    "too late": "{% for m in messages %}{{ m.content }} End.<|im_end|>\n{% endfor %}",
    "not its own": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endfor %}",
}


@pytest.mark.parametrize("which", NO_STOP)
@pytest.mark.parametrize("turns", [TURNS[:2], TURNS, TURNS[:3], TURNS[1:3]], ids=len)
def test_a_template_that_ends_answers_without_a_special_token_is_refused(which, turns):
    """Nor is the token that opens the next turn one that ends this."""
    kind, what = refusal(encode({"messages": turns}, with_template(NO_STOP[which])))
    assert kind == "no_stop_token"
    assert "without a special token" in what


def test_an_end_mark_that_is_no_special_token_of_this_tokenizer_is_no_stop_token():
    case = Case("zephyr", "chatml", "<|im_end|>")
    assert refusal(case.encode(TURNS))[0] == "no_stop_token"


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "gemma-2", "phi-3", "plain on tiny"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_a_special_token_in_what_is_said_is_refused(name, at, train_on):
    case = CASES[name]
    for token in {case.stop, case.tokenizer.eos_token}:
        for text in (token, f"What is {token}?", f"{token}\n"):
            turns = [*TURNS[:at], TURNS[at] | {"content": text}, *TURNS[at + 1 :]]
            kind, what = refusal(case.encode(turns, train_on=train_on))
            assert kind == "special_in_text"
            assert f"turn {at + 1} holds {token!r}" in what


STOP = "<|im_end|>"


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASKED, TOOL_TURNS[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": STOP}}}]}]},
        {"messages": [ASKED, TOOL_TURNS[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {STOP: 1}}}]}]},
        {"messages": [ASKED, TOOL_TURNS[1] | {"tool_calls": [{"function": {"name": STOP, "arguments": {}}}]}]},
        {"messages": [ASKED, ANSWERED | {"reasoning_content": f"Hm. {STOP}"}]},
        {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "description": STOP}}]},
    ],
    ids=["argument", "name of an argument", "name of a function", "thoughts", "tools"],
)
@pytest.mark.parametrize("settings", [{}, {"train_on": "last_assistant"}, {"train_on": "all"}])
def test_a_special_token_in_any_other_part_is_refused(values, settings):
    assert refusal(encode(values, tokenizer_of("qwen3"), **settings))[0] == "special_in_text"


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
def test_tokens_of_their_own_that_are_not_special_may_be_said(name):
    case = OWN[name]
    token = FAMILIES[name].added[0]
    turns = [{"role": "user", "content": f"What is {token}?"}, {"role": "assistant", "content": f"A {token}."}]
    (run,) = trained(case.example(turns), case.tokenizer)
    assert run.endswith(f"A {token}.{case.stop}")


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2", "mistral-v0.3", "tulu-3", "deepseek-v3"])
def test_two_bos_in_front_are_found(name):
    tokenizer = family_tokenizer(FAMILIES[name])
    tokenizer.chat_template = (
        "{{ bos_token }}" + ("{{ bos_token }}" if name == "tulu-3" else "") + tokenizer.chat_template
    )
    assert refusal(encode({"messages": TURNS}, tokenizer)) == ("double_bos", "two BOS tokens at the start")


def test_a_pad_token_that_is_the_end_token_hides_no_end_token():
    """Three conversations of different length, padded: of each all targets are aimed at, its end token included."""
    case = BUILT_IN["plain on zephyr"]
    assert case.tokenizer.pad_token == case.tokenizer.eos_token
    examples = [case.example(turns) for turns in (TURNS, TURNS[:2], SHAPES["system"])]
    batch = collate(examples, packed=False, pad_id=case.tokenizer.pad_token_id, device=torch.device("cpu"))
    aimed, at = batch.targets.tolist(), 0
    flat = batch.inputs["input_ids"].flatten()
    assert flat[batch.positions + 1].tolist() == aimed
    for row, example in enumerate(examples):
        mine = aimed[at : at + example.targets]
        expected = [answer for turn in SHAPES["multi"] if turn["role"] == "assistant" for answer in [turn["content"]]]
        assert text_of(mine, case.tokenizer) == "".join(
            f"{text}</s>" for text in expected[: mine.count(case.tokenizer.eos_token_id)]
        )
        assert mine.count(case.tokenizer.eos_token_id) == len(example.spans)
        assert batch.inputs["attention_mask"][row].tolist() == [1] * len(example.ids) + [0] * (
            batch.inputs["input_ids"].shape[1] - len(example.ids)
        )
        at += example.targets
    assert at == len(aimed)


# ── other tokenizers ────────────────────────────────────────────────────────────────────────────────────────────

WORDS = ["How", "many", "are", "Four", "And", "now", "Five", "since", "noon", "user", "assistant", "Be", "brief", "In"]
CHARACTERS = [chr(code) for code in range(33, 127)] + ["é", "ß", "\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def unigram(*, byte_fallback: bool = True, prepend: str = "always") -> Any:
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)] if byte_fallback else []
    pieces += [("▁", -3.0), *[(each, -9.0) for each in CHARACTERS], *[(f"▁{word}", -5.0) for word in WORDS]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def llama_2() -> Any:
    """BPE over characters with byte fallback; its normalizer writes spaces as ▁ and puts one in front."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *CHARACTERS]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = "▁"
        for character in word:
            if (piece, character) not in merges:
                merges.append((piece, character))
            piece += character
            tokens += [] if piece in tokens else [piece]
    backend = Tokenizer(
        models.BPE({token: id for id, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def lowercasing() -> Any:
    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


def fast(backend: Any, *, bos: bool = True) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


PIECEWISE: dict[str, Callable[[], Any]] = {
    "unigram": lambda: fast(unigram()),
    "unigram, first": lambda: fast(unigram(prepend="first")),
    "unigram, never": lambda: fast(unigram(prepend="never"), bos=False),
    "llama-2": lambda: fast(llama_2()),
}
STOPS = {"chatml": "<|im_end|>", "alpaca": "</s>", "plain": "</s>", "mistral": "</s>"}


def squeezed(text: str) -> str:
    """Without white space: such tokenizers put spaces in, and take some away when they decode."""
    return "".join(text.split())


@pytest.mark.parametrize("which", PIECEWISE)
@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize(
    "answers", [["Four.", "Five,\n\nsince noon."], ["Größe", "数 🙂"], ["  Four", "F"], ["?", "x" * 50]], ids=repr
)
def test_answers_of_tokenizers_of_pieces_are_trained_whole(which, template, answers):
    tokenizer = PIECEWISE[which]()
    turns = [ASKED, ANSWERED | {"content": answers[0]}, AGAIN, ANSWERED | {"content": answers[1]}]
    example = example_of(encode({"messages": turns}, tokenizer, template=template))
    runs = trained(example, tokenizer)
    assert list(map(squeezed, runs)) == [squeezed(answer) + STOPS[template] for answer in answers]
    case = Case("tiny", template, STOPS[template])
    words = {"chat_template": case.jinja, "tokenize": False}
    text = tokenizer.apply_chat_template(turns, **words)
    assert example.ids.count(tokenizer.bos_token_id) == ("never" not in which or template == "mistral")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    shift = len(example.ids) - len(encoding["input_ids"])
    assert example.ids[shift:] == encoding["input_ids"]
    for (first, last, _), at in zip(example.spans, (1, 3), strict=True):
        before = tokenizer.apply_chat_template(turns[:at], add_generation_prompt=True, **words)
        start, end = len(before), text.index(STOPS[template], len(before)) + len(STOPS[template])
        held = [n for n, (a, b) in enumerate(encoding["offset_mapping"]) if b > start and a < end]
        # pieces of a character have its place; a ▁ that was put in may have the place of what follows, or none
        assert set(held) - set(range(first - shift, last - shift)) <= {held[0]}
        assert set(range(first - shift, last - shift)) <= set(range(held[0] - 1, held[-1] + 1))


@pytest.mark.parametrize("place", [0, 1])
def test_characters_that_a_tokenizer_has_not_are_found_wherever_they_stand(place):
    tokenizer = fast(unigram(byte_fallback=False))
    turns = [dict(turn) for turn in TURNS[:2]]
    example_of(encode({"messages": turns}, tokenizer, template="plain"))
    turns[place]["content"] += " 数"
    encoded = encode({"messages": turns}, tokenizer, template="plain")
    assert encoded.findings
    assert encoded.findings[0].kind == "not_round_trip"
    assert "'数'" in str(encoded.findings[0].error)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASKED | {"content": "how many?"}, ANSWERED]},
        {"messages": [ASKED, ANSWERED | {"content": "four."}]},
        {"text": "Four."},
        {"prompt": "how many? ", "completion": "Four."},
        {"prompt": "How many? ", "completion": "four."},
        {"instruction": "How many?", "output": "four."},
    ],
    ids=["answer", "question", "text", "completion", "prompt", "instruction"],
)
def test_what_a_lossy_tokenizer_loses_is_found_wherever_it_stands(values):
    tokenizer = fast(lowercasing())
    template = {"template": "chatml"} if {"messages", "instruction"} & set(values) else {}
    encoded = encode(values, tokenizer, **template)
    assert encoded.findings
    assert encoded.findings[0].kind == "not_round_trip"
    lowered = {
        key: [turn | {"content": turn["content"].lower()} for turn in value] if key == "messages" else value.lower()
        for key, value in values.items()
    }
    example_of(encode(lowered, tokenizer, **template))


# ── text and completion ─────────────────────────────────────────────────────────────────────────────────────────


def ended(tokenizer: Any) -> Any:
    """One that puts its BOS in front and its end token behind."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    pairs = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


WHOLE: dict[str, Callable[[], Any]] = {
    "tiny": make_tokenizer,
    "llama-3.1": lambda: family_tokenizer(FAMILIES["llama-3.1"]),
    "olmo-2": lambda: family_tokenizer(FAMILIES["olmo-2"]),
    "zephyr": lambda: family_tokenizer(FAMILIES["zephyr"]),
    "ended": lambda: ended(make_tokenizer()),
    "llama-2": lambda: fast(llama_2()),
}


@cache
def whole_tokenizer(which: str) -> Any:
    return WHOLE[which]()


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return ids[: ids.index(tokenizer("a", add_special_tokens=False)["input_ids"][0])]


printable = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)


@pytest.mark.parametrize("which", WHOLE)
@settings(deadline=None, max_examples=25)
@given(text=printable.filter(str.strip))
def test_a_text_is_trained_whole_and_ended_once(which, text):
    tokenizer = whole_tokenizer(which)
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    example = example_of(encode({"text": text}, tokenizer))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(example.ids) == [*opening(tokenizer), *plain, tokenizer.eos_token_id]
    assert example.spans == [(0, len(example.ids), 1.0)]
    assert example.targets == len(example.ids) - 1


@pytest.mark.parametrize("which", WHOLE)
@pytest.mark.parametrize("train_on", ["completion", "all"])
@settings(deadline=None, max_examples=25)
@given(prompt=printable, completion=printable.filter(str.strip))
def test_a_completion_is_trained_behind_its_prompt_as_that_stands_alone(which, train_on, prompt, completion):
    tokenizer = whole_tokenizer(which)
    example = example_of(encode({"prompt": prompt, "completion": completion}, tokenizer, train_on=train_on))
    alone = [*opening(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert list(example.ids[: len(alone)]) == alone
    assert example.ids[-1] == tokenizer.eos_token_id
    answer = tokenizer.decode(example.ids[len(alone) : -1])
    assert answer == completion or (which == "llama-2" and squeezed(answer) == squeezed(completion))
    assert example.spans == [(0 if train_on == "all" else len(alone), len(example.ids), 1.0)]


@pytest.mark.parametrize("which", WHOLE)
@pytest.mark.parametrize("prompt", ["How many?{}", "{}", "{}How many?", "How many?{}\n", "How many?{}{}"])
def test_an_end_token_in_the_prompt_is_the_prompts_and_not_trained(which, prompt):
    tokenizer = whole_tokenizer(which)
    prompt = prompt.replace("{}", tokenizer.eos_token)
    encoded = encode({"prompt": prompt, "completion": "Four."}, tokenizer)
    if encoded.findings:  # where the end token is the BOS too
        assert encoded.findings[0].kind == "double_bos"
        return
    example = example_of(encoded)
    (run,) = trained(example, tokenizer)
    assert run == "Four." + tokenizer.eos_token
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(example.ids[: example.spans[0][0]]) == [*opening(tokenizer), *before]


@pytest.mark.parametrize("which", WHOLE)
def test_an_end_token_that_stands_there_already_is_not_doubled(which):
    tokenizer = whole_tokenizer(which)
    end = tokenizer.eos_token
    for values in ({"text": f"Four.{end}"}, {"prompt": "How many?\n", "completion": f"Four.{end}"}):
        ids = list(example_of(encode(values, tokenizer)).ids)
        assert ids.count(tokenizer.eos_token_id) == 1 + opening(tokenizer).count(tokenizer.eos_token_id)
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("which", WHOLE)
def test_a_text_that_is_but_an_end_token_has_a_target_only_behind_a_bos(which):
    tokenizer = whole_tokenizer(which)
    encoded = encode({"text": tokenizer.eos_token}, tokenizer)
    if opening(tokenizer):
        assert example_of(encoded).targets == 1
    else:
        assert refusal(encoded)[0] == "no_target"


@pytest.mark.parametrize("settings", [{}, {"train_on": "all"}])
@pytest.mark.parametrize("said", [{"train": False}, {"weight": 0}, {"weight": 5}])
def test_what_is_said_of_a_users_turn_changes_no_weight(settings, said):
    """Many data sets write train: false to every turn but the assistant's."""
    example = OWN["zephyr"].example([ASKED | said, ANSWERED, AGAIN | said], **settings)
    assert [weight for _, _, weight in example.spans] == [1.0]
    assert example.target_weight == example.targets
