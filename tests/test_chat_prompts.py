"""What a conversation is prompted with, where its answers end, and what is said of rows that cannot be trained so."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from conftest import write_rows
from more_chat_families import tokenizer_of
from test_chat_masks import encode, example_of, refusal, trained
from test_chat_table import CONVERSATIONS, Q2, SYSTEM, TOOLS, A, Q, calls, pieces, result, says, thinks, user

from lora_cli.data.chat.template import ChatTemplate, chat_template
from lora_cli.data.prepare import prepare
from lora_cli.data.preview import as_text, tokens_of
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe


def fix_of(encoded: Any) -> str:
    return str(encoded.findings[0].error.fix)


# ── where an answer ends ────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_is_trained_to_the_token_at_which_the_model_stops_also_behind_another():
    tokenizer = tokenizer_of("cohere")
    end = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    example = example_of(encode({"messages": [Q, A, Q2, says("Five.")]}, tokenizer))
    assert trained(example, tokenizer) == [f"<|START_RESPONSE|>Four.{end}", f"<|START_RESPONSE|>Five.{end}"]
    assert ChatTemplate(tokenizer.chat_template, tokenizer, "own").stop_token == "<|END_OF_TURN_TOKEN|>"


def test_answers_that_end_otherwise_as_the_last_one_are_found_and_each_keeps_its_end_if_that_is_allowed():
    tokenizer = tokenizer_of("harmony")
    encoded = encode({"messages": [Q, A, Q2, says("Five.")]}, tokenizer)
    assert encoded.findings[0].kind == "two_forms"
    assert "'<|channel|>final<|message|>Four.<|end|>'" in encoded.findings[0].error.what
    assert "'<|channel|>final<|message|>Four.<|return|>'" in encoded.findings[0].error.what
    assert [run.rpartition(">")[0][-8:] for run in trained(encoded.example, tokenizer)] == ["r.<|end|", "|return|"]
    last = example_of(encode({"messages": [Q, A, Q2, says("Five.")]}, tokenizer, train_on="last_assistant"))
    assert trained(last, tokenizer) == ["<|channel|>final<|message|>Five.<|return|>"]


def test_a_call_ends_where_the_model_stops_to_be_answered():
    tokenizer = tokenizer_of("harmony")
    example = encode({"messages": CONVERSATIONS["call"], "tools": TOOLS}, tokenizer).example
    assert trained(example, tokenizer)[0].endswith('{"of": "Äpfel", "n": 0}<|call|>')


# ── one answer, one form ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("turns", [[Q, A, Q2, says("Five.")], CONVERSATIONS["call"], CONVERSATIONS["calls at once"]])
def test_an_answer_with_another_form_as_the_last_one_is_found_and_the_fix_works(turns):
    tokenizer = tokenizer_of("qwen3")
    values = {"messages": turns, "tools": TOOLS if len(turns[1]) > 2 else None}
    encoded = encode(values, tokenizer)
    assert refusal(encoded)[0] == "two_forms"
    assert fix_of(encoded).startswith("write data.train_on: last_assistant, or data.allow: [two_forms]")
    example_of(encode(values, tokenizer, train_on="last_assistant"))
    first, *_ = trained(encoded.example, tokenizer)  # what `allow` trains
    assert "<think>" not in first
    assert first.endswith("<|im_end|>")
    assert first.count("<|im_end|>") == 1


def test_a_question_behind_the_last_answer_changes_it_and_the_fix_says_so():
    tokenizer = tokenizer_of("qwen3")
    encoded = encode({"messages": [Q, A, Q2]}, tokenizer)
    assert fix_of(encoded).startswith("remove what comes after turn 2")
    example_of(encode({"messages": [Q, A]}, tokenizer))


def test_empty_think_blocks_and_dropped_thinking_are_counted():
    tokenizer = tokenizer_of("qwen3")
    assert encode({"messages": [Q, A]}, tokenizer).notes == ("empty_thoughts",)
    assert encode({"messages": [Q, thinks("Four.")]}, tokenizer).notes == ()
    turns = [Q, thinks("Three."), Q, thinks("Four."), Q2, thinks("Five.")]
    assert encode({"messages": turns}, tokenizer, train_on="last_assistant").notes == ("forgotten_thoughts",) * 2


def test_an_open_think_block_of_the_prompt_is_closed_by_the_answer():
    tokenizer = tokenizer_of("qwen3.5")
    encoded = encode({"messages": [Q, A]}, tokenizer)
    example = example_of(encoded)
    assert trained(example, tokenizer) == ["\n</think>\n\nFour.<|im_end|>"]
    prompt = tokenizer.apply_chat_template([Q], add_generation_prompt=True, tokenize=False)
    first = example.spans[0][0]
    assert list(example.ids[:first]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert encoded.notes == ("empty_thoughts",)


def test_the_last_answer_is_the_last_one_also_if_it_says_nothing():
    tokenizer = tokenizer_of("zephyr")
    turns = [Q, A, Q2, says(" ")]
    assert refusal(encode({"messages": turns}, tokenizer, train_on="last_assistant"))[0] == "no_target"
    assert trained(example_of(encode({"messages": turns}, tokenizer)), tokenizer) == ["Four.</s>"]


# ── true reasons ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("turn", [thinks("Four."), says("Four.", reasoning_content="Let me see.")], ids=["in", "apart"])
def test_thinking_that_a_template_always_drops_is_said_to_be_dropped(turn):
    encoded = encode({"messages": [Q, turn]}, tokenizer_of("deepseek-r1"))
    kind, what = refusal(encoded)
    assert kind == "malformed"
    assert "drops a part of turn 2, its thinking" in what
    assert "longer conversation" not in what


def test_a_call_that_a_template_has_no_place_for_is_called_one():
    turns = [Q, calls("count"), result("4"), A]
    kind, what = refusal(encode({"messages": turns}, tokenizer_of("olmo-2")))
    assert kind == "malformed"
    assert "has no place for the tool call of turn 2" in what or "leaves out turn 3, by tool" in what
    assert "thinking" not in what


def test_what_a_template_raises_is_said_in_its_words_and_the_fix_works():
    tokenizer = tokenizer_of("qwen3.5")
    turns = [SYSTEM, says("Hello."), SYSTEM, Q, A]
    encoded = encode({"messages": turns}, tokenizer)
    assert refusal(encoded)[1].endswith("refuses this conversation: System message must be at the beginning.")
    assert "roles and their order" not in fix_of(encoded)
    template = fix_of(encoded).removeprefix("write data.template: ")
    example_of(encode({"messages": turns}, tokenizer, template=template))


def test_an_error_in_a_template_is_told_with_its_line():
    tokenizer = tokenizer_of("qwen2.5")
    template = "{% for m in messages %}\n{{ m.content + m.name.first }}<|im_end|>\n{% endfor %}"
    with pytest.raises(LoraError, match=r"fails on this conversation: UndefinedError: .*line 2 of the template"):
        ChatTemplate(template, tokenizer, "mine.jinja").render([Q, A], "row 1")


# ── what is kept with the adapter ───────────────────────────────────────────────────────────────────────────────


def test_arguments_are_read_by_training_and_written_into_the_template_that_is_kept():
    tokenizer = tokenizer_of("qwen3")
    kept = chat_template(tokenizer, None, arguments={"enable_thinking": False}).text
    prompt = tokenizer.apply_chat_template([Q], chat_template=kept, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    recipe = {
        "base_model": "-",
        "output": "-",
        "data": {"train": "-", "template_arguments": {"enable_thinking": False}},
    }
    assert Recipe.model_validate(recipe).data.template_arguments == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("harmony", {"reasoning_effort": "low"}, "Reasoning: low<|end|>"),
        ("harmony", {"reasoning_effort": 'very "high"\n{{ x }} ü'}, 'Reasoning: very "high"\n{{ x }} ü<|end|>'),
        ("qwen3", {"enable_thinking": False}, "<think>\n\n</think>\n\nFour."),
    ],
)
def test_a_run_with_arguments_keeps_a_template_that_makes_its_prompts(tmp_path, name, arguments, shown):
    tokenizer = tokenizer_of(name)
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", [{"messages": [Q, A]}])), "template_arguments": arguments}
    recipe = Recipe.model_validate({"base_model": "-", "output": str(tmp_path / "run"), "data": data})
    prepared = prepare(recipe, tokenizer)
    (example,) = prepared.train
    kept = prepared.summary.own_template
    assert kept is not None
    ids = [int(id) for id in example.ids]
    assert shown in tokenizer.decode(ids)
    prompt = tokenizer.apply_chat_template([Q], chat_template=kept, add_generation_prompt=True, tokenize=False)
    first = example.spans[0][0]
    assert ids[:first] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert not prepared.findings.counts.get("empty_thoughts")


def test_an_argument_that_the_template_does_not_read_is_refused_with_those_that_it_reads(tmp_path):
    with pytest.raises(LoraError, match="does not read enable_thoughts") as error:
        chat_template(tokenizer_of("qwen3"), None, arguments={"enable_thoughts": False})
    assert str(error.value.fix).startswith("remove it, or write one of those that it reads: enable_thinking")
    with pytest.raises(LoraError, match="does not read messages"):
        chat_template(tokenizer_of("qwen3"), None, arguments={"messages": "all"})


@pytest.mark.parametrize("setting", [{"template_arguments": {"enable_thinking": False}}, {"template": "chatml"}])
@pytest.mark.parametrize("more", [{}, {"streaming": True}])
def test_what_is_said_of_a_template_that_no_row_goes_through_is_refused_and_the_fix_works(
    lora, recipe_file, tmp_path, setting, more
):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": f"b {at}"} for at in range(9)])
    recipe = recipe_file(data={"train": str(rows), **setting, **more}, train={"max_steps": 2} if more else {})
    said = lora("check", recipe)
    assert said.code == 2
    assert f"data.{next(iter(setting))} is set, but no row goes through a chat template" in said.error
    fixed = re.findall(r"--set (\S+=[^\s,)]+)", said.error)
    assert lora("check", recipe, "--set", fixed[0]).code == 0


@pytest.mark.parametrize("name", ["tulu-3", "llama-3.1", "zephyr"])
@pytest.mark.parametrize("template", [None, "plain", "alpaca"])
def test_a_bos_that_training_has_is_in_the_template_that_is_kept(name, template):
    tokenizer = tokenizer_of(name)
    kept = chat_template(tokenizer, template).text
    example = example_of(encode({"messages": [Q, A]}, tokenizer, template=template))
    text = tokenizer.apply_chat_template([Q, A], chat_template=kept, tokenize=False)
    if not (name == "llama-3.1" and template is None):  # it prints today's date
        assert list(example.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.startswith(tokenizer.bos_token)
    assert (kept == tokenizer.chat_template) == ((name, template) == ("llama-3.1", None))  # which writes it itself


# ── what is shown, and how long it takes ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_the_preview_keeps_the_blanks_of_tokenizers_of_pieces(prepend):
    tokenizer = pieces(prepend=prepend)
    text = "How many  now? Größe, said 数 It is"
    example = example_of(encode({"messages": [user(text), says(text)]}, tokenizer, template="chatml"))
    shown = as_text(example, tokenizer, colour=False).plain
    assert shown.count(text) == 2
    whole = tokenizer.decode([int(id) for id in example.ids])
    if "\ufffd" not in "".join(token.text for token in tokens_of(example, tokenizer)):
        assert "".join(token.text for token in tokens_of(example, tokenizer)) == whole


def test_a_conversation_of_twenty_thousand_turns_takes_seconds():
    tokenizer = tokenizer_of("zephyr")
    turns = [user(f"{at}?") if at % 2 == 0 else says(f"{at}.") for at in range(20_000)]
    began = time.perf_counter()
    example = example_of(encode({"messages": turns}, tokenizer))
    assert time.perf_counter() - began < 40
    assert len(example.spans) == 10_000
    for at in (0, 1, 4_999, 9_999):
        first, last, _ = example.spans[at]
        assert tokenizer.decode(example.ids[first:last]) == f"{2 * at + 1}.</s>"


def test_a_long_conversation_that_is_framed_otherwise_is_refused_not_guessed():
    tokenizer = tokenizer_of("zephyr")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '!' if loop.index == 700 }}\n{{ m.content }}</s>\n{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt }}"
    )
    turns = [user(f"{at}?") if at % 2 == 0 else says(f"{at}.") for at in range(1_000)]
    assert "too long to be proved turn by turn" in refusal(encode({"messages": turns}, tokenizer))[1]
