"""What chat templates render: the built-in ones, and the well-known families that the other tests lean on."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, TEMPLATES, Family, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

BUILT_IN_FOLDER = Path(__file__).parents[1] / "lora_cli" / "data" / "templates"
BUILT_IN = {path.stem: path.read_text(encoding="utf-8") for path in BUILT_IN_FOLDER.glob("*.jinja")}
STOPS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}  # the others end with eos
STANFORD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TOOLLESS = ["mistral", "gemma", "alpaca", "plain"]

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Five."},
]
TOOL = {
    "type": "function",
    "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "count", "arguments": {"of": "Äpfel"}}}
TOOL_TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Four."},
]

EXPECTED = {
    "chatml": """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
How many?<|im_end|>
<|im_start|>assistant
Four.<|im_end|>
<|im_start|>user
And now?<|im_end|>
<|im_start|>assistant
Five.<|im_end|>
""",
    "llama-3": """\
<s><|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

How many?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Four.<|eot_id|><|start_header_id|>user<|end_header_id|>

And now?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Five.<|eot_id|>""",
    "mistral": """\
<s>[INST] Be brief.

How many? [/INST]Four.</s>[INST] And now? [/INST]Five.</s>""",
    "gemma": """\
<s><start_of_turn>user
Be brief.

How many?<end_of_turn>
<start_of_turn>model
Four.<end_of_turn>
<start_of_turn>user
And now?<end_of_turn>
<start_of_turn>model
Five.<end_of_turn>
""",
    "alpaca": """\
Be brief.

### Instruction:
How many?

### Response:
Four.</s>

### Instruction:
And now?

### Response:
Five.</s>""",
    "plain": """\
System:
Be brief.
User:
How many?
Assistant:
Four.</s>
User:
And now?
Assistant:
Five.</s>
""",
}


@pytest.fixture
def render(tokenizer):
    """Renders a conversation through one of the built-in templates."""

    def built_in(name: str, turns: list[dict[str, Any]], *, generation_prompt: bool = False, **variables: Any) -> str:
        variables = {"bos_token": "<s>", "eos_token": "</s>"} | variables
        return tokenizer.apply_chat_template(
            turns, chat_template=BUILT_IN[name], add_generation_prompt=generation_prompt, tokenize=False, **variables
        )

    return built_in


class TestBuiltIn:
    def test_all_are_tested(self):
        assert set(BUILT_IN) == set(EXPECTED)
        assert all(text.startswith("{#- ") for text in BUILT_IN.values())  # where the layout comes from

    @pytest.mark.parametrize("name", EXPECTED)
    def test_renders_exactly(self, render, name):
        assert render(name, [SYSTEM, *TURNS]) == EXPECTED[name]

    @pytest.mark.parametrize(
        ("name", "opening", "without"),
        [
            ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n", ""),
            ("llama-3", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", ""),
            ("mistral", "Be brief.\n\n", ""),
            ("gemma", "Be brief.\n\n", ""),
            ("alpaca", "Be brief.", STANFORD),
            ("plain", "System:\nBe brief.\n", ""),
        ],
    )
    def test_without_a_system_turn_its_place_is_left_out_or_alpaca_puts_its_preamble(
        self, render, name, opening, without
    ):
        assert EXPECTED[name].count(opening) == 1
        assert render(name, TURNS) == EXPECTED[name].replace(opening, without)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.text(max_size=20), min_size=2, max_size=7), st.booleans(), st.sampled_from(["<s>", None]))
    def test_an_answer_follows_the_generation_prompt_at_once_and_ends_with_its_stop(
        self, tokenizer, texts, system, bos
    ):
        roles = [*["system"] * system, *["user", "assistant"] * 4]
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        for name, template in BUILT_IN.items():
            words = {"chat_template": template, "tokenize": False, "bos_token": bos, "eos_token": "</s>"}
            whole = tokenizer.apply_chat_template(turns, **words)
            for at, turn in enumerate(turns):
                if turn["role"] != "assistant":
                    continue
                before = tokenizer.apply_chat_template(turns[:at], add_generation_prompt=True, **words)
                upto = tokenizer.apply_chat_template(turns[: at + 1], **words)
                assert upto.removesuffix("\n") == before + turn["content"] + STOPS.get(name, "</s>")
                assert whole.startswith(upto)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_no_bos_gives_nothing(self, tokenizer, render, name):
        without = EXPECTED[name].removeprefix("<s>")
        assert render(name, [SYSTEM, *TURNS], bos_token=None) == without
        assert "bos_token" not in tokenizer.special_tokens_map
        words = {"chat_template": BUILT_IN[name], "tokenize": False, "eos_token": "</s>"}
        assert tokenizer.apply_chat_template([SYSTEM, *TURNS], **words) == without

    @pytest.mark.parametrize("name", ["mistral", "alpaca", "plain"])
    def test_a_missing_eos_is_refused(self, render, name):
        with pytest.raises((TemplateError, TypeError)):
            render(name, TURNS, eos_token=None)

    @pytest.mark.parametrize("name", TOOLLESS)
    def test_tools_are_refused_where_there_is_no_place_for_them(self, render, name):
        refusal = pytest.raises(TemplateError, match=f"the {name} template has no place for tools")
        with refusal:
            render(name, TURNS, tools=[TOOL])
        with refusal:
            render(name, TOOL_TURNS[:2])
        with refusal:
            render(name, [TURNS[0], {"role": "tool", "content": "4"}])
        assert render(name, TURNS, tools=None) == render(name, TURNS, tools=[])

    @pytest.mark.parametrize("name", ["mistral", "gemma"])
    @pytest.mark.parametrize("turns", [TURNS[:1] * 2, TURNS[1:], [SYSTEM, TURNS[1]], [TURNS[0], SYSTEM], [SYSTEM] * 2])
    def test_roles_that_do_not_alternate_are_refused(self, render, name, turns):
        with pytest.raises(TemplateError, match="wants user and assistant in turn"):
            render(name, turns)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_unknown_roles_are_refused(self, render, name):
        with pytest.raises(TemplateError, match=r"knows no role narrator|wants user and assistant in turn"):
            render(name, [*TURNS, {"role": "narrator", "content": "Silence."}])

    @pytest.mark.parametrize("name", ["alpaca", "plain"])
    def test_a_later_system_turn_is_refused(self, render, name):
        with pytest.raises(TemplateError, match="knows no role system here"):
            render(name, [*TURNS, SYSTEM])

    def test_chatml_renders_tools(self, render):
        text = render("chatml", [SYSTEM, *TOOL_TURNS], tools=[TOOL, TOOL])
        listed, _, said = text.partition("</tools>")
        assert listed == (
            "<|im_start|>system\nBe brief.\n\nYou may call these functions to help the user:\n<tools>\n"
            + 2 * f"{json.dumps(TOOL)}\n"
        )
        assert said.partition("<|im_end|>\n")[2] == (
            "<|im_start|>user\nHow many?<|im_end|>\n"
            '<|im_start|>assistant\n<tool_call>\n{"name": "count", "arguments": {"of": "Äpfel"}}\n</tool_call>'
            "<|im_end|>\n"
            "<|im_start|>tool\n<tool_response>\n4\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\nFour.<|im_end|>\n"
        )

    def test_llama_3_renders_tools(self, render):
        text = render("llama-3", [SYSTEM, *TOOL_TURNS], tools=[TOOL])
        start, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
        system, *rest = text.split("<|eot_id|>")
        assert system.startswith(f"<s>{start}system{end}Be brief.\n\nYou have these functions:\n\n")
        assert json.dumps(TOOL, indent=4) in system
        assert rest == [
            f"{start}user{end}How many?",
            f'{start}assistant{end}{{"name": "count", "parameters": {{"of": "Äpfel"}}}}',
            f"{start}ipython{end}4",
            f"{start}assistant{end}Four.",
            "",
        ]

    @pytest.mark.parametrize("name", ["chatml", "llama-3"])
    def test_tools_may_be_called_beside_an_answer_several_at_once_and_with_arguments_as_text(self, render, name):
        spoken = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
        before = render(name, TURNS[:1], tools=[TOOL], generation_prompt=True)
        text = render(name, [TURNS[0], spoken], tools=[TOOL])
        assert text.startswith(before + "Let me see.\n")
        assert text.removeprefix(before).count('{"name": "count"') == 2
        written = CALL | {"function": {"name": "count", "arguments": '{"of": "Äpfel"}'}}
        assert render(name, [TURNS[0], spoken | {"tool_calls": [written] * 2}], tools=[TOOL]) == text
        results = [{"role": "tool", "content": content} for content in ({"count": 4}, '{"count": 4}')]
        assert len({render(name, [TURNS[0], spoken, result]) for result in results}) == 1


def rendered(name: str, turns: list[dict[str, Any]], **variables: Any) -> str:
    text = family_tokenizer(FAMILIES[name]).apply_chat_template(turns, tokenize=False, **variables)
    assert isinstance(text, str)
    return text


def turns_for(family: Family) -> list[dict[str, Any]]:
    return [SYSTEM, *TURNS] if family.system else TURNS


def test_every_template_file_has_a_family():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
class TestEveryFamily:
    def test_its_tokenizer_has_its_tokens(self, family):
        tokenizer = family_tokenizer(family)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (family.bos, family.eos, family.eos)
        assert len(tokenizer) <= 512  # the tiny models' embeddings hold them
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        plain = set(tokenizer.added_tokens_decoder) - special
        named = {family.eos, *([family.bos] if family.bos else [])}
        assert special == set(tokenizer.convert_tokens_to_ids(sorted(named | set(family.special))))
        assert plain == set(tokenizer.convert_tokens_to_ids(sorted(family.added)))
        assert family.turn_end in named | set(family.special)
        text = "Größe, 4 + 5\n\n  <b>"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        expected = [tokenizer.bos_token_id] if family.wants_bos else []
        assert tokenizer(text)["input_ids"] == expected + tokenizer(text, add_special_tokens=False)["input_ids"]

    def test_every_answer_is_followed_by_its_turn_end(self, family):
        text = rendered(family.name, turns_for(family))
        assert "Four." + family.turn_end in text
        assert "Five." + family.turn_end in text
        tokenizer = family_tokenizer(family)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids(family.turn_end)) >= 2

    def test_system_turns_are_taken_as_the_table_says(self, family):
        turns = [SYSTEM, TURNS[0]]
        if family.system:
            assert "Be brief." in rendered(family.name, turns)
        else:
            with pytest.raises(TemplateError, match="System role not supported"):
                rendered(family.name, turns)

    def test_tools_are_listed_as_the_table_says(self, family):
        differs = rendered(family.name, TURNS, tools=[TOOL]) != rendered(family.name, TURNS)
        assert differs == family.tools or family.name == "smollm3"  # lists them, but drops the calls
        if family.tools:
            text = rendered(family.name, TOOL_TURNS, tools=[TOOL])
            assert "Counts." in text
            assert '"name": "count"' in text
            assert text.index("How many?") < text.index("Äpfel") < text.index("Four.")

    def test_thoughts_are_kept_as_text_or_treated_as_the_table_says(self, family):
        thoughtful = [
            {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{text}"} for text in ("Four.", "Five.")
        ]
        turns = [TURNS[0], thoughtful[0], TURNS[2], thoughtful[1]]
        kept = rendered(family.name, turns).count("Hm.")
        assert kept == {"qwen3": 1, "deepseek-r1": 0}.get(family.name, 2)
        modes = {
            rendered(family.name, TURNS[:1], add_generation_prompt=True, enable_thinking=on) for on in (True, False)
        }
        assert (len(modes) == 2 or kept < 2) == family.thinking

    def test_the_text_begins_with_bos_or_has_none(self, family):
        text = rendered(family.name, turns_for(family))
        assert text.startswith(family.bos or "\0") == (
            family.name not in ("qwen2.5", "qwen3", "smollm3", "phi-3", "zephyr", "tulu-3")
        )


class TestLlama3:
    def test_has_a_dated_system_turn_even_without_one_and_trims(self):
        head = "<|start_header_id|>{}<|end_header_id|>\n\n"
        dated = (
            "<|begin_of_text|>" + head.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: {}\n\n"
        )
        turn = head.format("user") + "How many?<|eot_id|>"
        assert rendered("llama-3.1", [{"role": "user", "content": " How many?\n"}]) == (
            dated.format("26 Jul 2024") + "<|eot_id|>" + turn
        )
        assert rendered("llama-3.1", [SYSTEM, TURNS[0]], date_string="1 Jan 2025") == (
            dated.format("1 Jan 2025") + "Be brief.<|eot_id|>" + turn
        )

    def test_puts_tools_into_the_first_user_turn_and_results_into_json(self):
        text = rendered("llama-3.1", TOOL_TURNS, tools=[TOOL])
        assert "Environment: ipython\n" in text
        assert text.index("user<|end_header_id|>") < text.index('"name": "count"') < text.index("How many?")
        assert 'assistant<|end_header_id|>\n\n{"name": "count", "parameters": {"of": "Äpfel"}}<|eot_id|>' in text
        assert 'ipython<|end_header_id|>\n\n"4"<|eot_id|>' in text  # a string is iterable: it is quoted

    def test_takes_one_call_a_turn_and_drops_what_is_said_beside_it(self):
        two = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
        with pytest.raises(TemplateError, match="One tool call"):
            rendered("llama-3.1", [TURNS[0], two])
        assert "Let me see." not in rendered("llama-3.1", [TURNS[0], two | {"tool_calls": [CALL]}])

    def test_asked_for_special_tokens_its_bos_is_doubled(self):
        tokenizer = family_tokenizer(FAMILIES["llama-3.1"])
        assert tokenizer(rendered("llama-3.1", TURNS))["input_ids"].count(tokenizer.bos_token_id) == 2


class TestQwen:
    def test_qwen2_has_a_default_system_turn(self):
        start = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        assert rendered("qwen2.5", TURNS[:1]) == start + "<|im_start|>user\nHow many?<|im_end|>\n"
        assert "You are Qwen" not in rendered("qwen2.5", [SYSTEM, TURNS[0]])
        assert not rendered("qwen3", TURNS[:1]).startswith("<|im_start|>system")

    @pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
    def test_results_of_several_calls_share_a_user_turn(self, name):
        turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, *TOOL_TURNS[2:3] * 2]
        answer = "\n<tool_response>\n4\n</tool_response>"
        assert rendered(name, turns).endswith(f"<|im_start|>user{answer}{answer}<|im_end|>\n")

    def test_qwen2_writes_arguments_given_as_text_twice_over(self):
        written = CALL | {"function": {"name": "count", "arguments": '{"of": 1}'}}
        turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [written]}]
        assert '"arguments": "{\\"of\\": 1}"}' in rendered("qwen2.5", turns)
        assert '"arguments": {"of": 1}}' in rendered("qwen3", turns)

    def test_qwen3_keeps_thoughts_after_the_last_question_only(self):
        before = rendered("qwen3", TURNS[:1], add_generation_prompt=True)
        assert before.endswith("<|im_start|>assistant\n")
        alone = rendered("qwen3", TURNS[:2])
        assert alone == before + "<think>\n\n</think>\n\nFour.<|im_end|>\n"
        assert rendered("qwen3", TURNS).startswith(before + "Four.<|im_end|>\n<|im_start|>user")
        thought = [TURNS[0], {"role": "assistant", "content": "<think>Hm.</think>Four."}]
        apart = [TURNS[0], {"role": "assistant", "content": "Four.", "reasoning_content": "Hm."}]
        assert rendered("qwen3", thought) == rendered("qwen3", apart)
        assert rendered("qwen3", thought) == before + "<think>\nHm.\n</think>\n\nFour.<|im_end|>\n"
        assert "Hm." not in rendered("qwen3", [*thought, TURNS[2]])

    def test_qwen3_keeps_thoughts_between_calls(self):
        turns = [TURNS[0], TOOL_TURNS[1] | {"reasoning_content": "I must count."}, *TOOL_TURNS[2:]]
        assert "<think>\nI must count.\n</think>\n\n<tool_call>" in rendered("qwen3", turns)
        assert "I must count." not in rendered("qwen3", [*turns, TURNS[2]])

    def test_qwen3_closes_the_thoughts_in_the_generation_prompt_when_told_not_to_think(self):
        words = {"add_generation_prompt": True, "enable_thinking": False}
        assert rendered("qwen3", TURNS[:1], **words).endswith("assistant\n<think>\n\n</think>\n\n")


class TestGemma:
    def test_the_assistant_is_called_model_and_contents_are_trimmed(self):
        turns = [{"role": "user", "content": " How many?\n"}, {"role": "assistant", "content": " Four. "}]
        expected = "<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\nFour.<end_of_turn>\n"
        for name in ("gemma-2", "gemma-3"):
            assert rendered(name, turns) == expected
            assert rendered(name, turns[:1], add_generation_prompt=True) == expected.partition("Four.")[0]
            with pytest.raises(TemplateError, match="must alternate"):
                rendered(name, TURNS[:1] * 2)

    def test_gemma_3_opens_the_first_user_turn_with_the_system_turn_and_takes_parts(self):
        expected = "<bos><start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n"
        parts = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
        assert rendered("gemma-3", [SYSTEM, TURNS[0]]) == rendered("gemma-3", [SYSTEM, *parts]) == expected


class TestMistral:
    def test_has_no_generation_prompt_and_a_space_before_the_answer(self):
        before = rendered("mistral-v0.3", TURNS[:1])
        assert rendered("mistral-v0.3", TURNS[:1], add_generation_prompt=True) == before == "<s>[INST] How many?[/INST]"
        assert rendered("mistral-v0.3", TURNS[:2]) == before + " Four.</s>"

    def test_wants_roles_to_alternate(self):
        with pytest.raises(TemplateError, match="must alternate"):
            rendered("mistral-v0.3", TURNS[:1] * 2)

    def test_the_system_turn_stands_in_the_last_user_turn_and_vanishes_before_an_answer(self):
        assert rendered("mistral-v0.3", [SYSTEM, *TURNS[:3]]) == (
            "<s>[INST] How many?[/INST] Four.</s>[INST] Be brief.\n\nAnd now?[/INST]"
        )
        assert rendered("mistral-v0.3", [SYSTEM, *TURNS]) == rendered("mistral-v0.3", TURNS)

    def test_tools_stand_before_the_last_user_turn_and_ids_have_nine_characters(self):
        asked = {"role": "user", "content": "And the rest?"}
        text = rendered("mistral-v0.3", [*TURNS, asked, *TOOL_TURNS[1:]], tools=[TOOL])
        assert text.index("Five.</s>") < text.index("[AVAILABLE_TOOLS] [{") < text.index("[INST] And the rest?")
        assert '[TOOL_CALLS] [{"name": "count", "arguments": {"of": "Äpfel"}, "id": "abcdefghi"}]</s>' in text
        assert '[TOOL_RESULTS] {"content": 4, "call_id": "abcdefghi"}[/TOOL_RESULTS] Four.</s>' in text
        with pytest.raises(TemplateError, match="length 9"):
            rendered("mistral-v0.3", [TURNS[0], TOOL_TURNS[1] | {"tool_calls": [CALL | {"id": "1"}]}])


class TestPhi3:
    def test_eos_ends_the_conversation_when_nothing_is_to_follow(self):
        assert rendered("phi-3", TURNS[:2]) == (
            "<|user|>\nHow many?<|end|>\n<|assistant|>\nFour.<|end|>\n<|endoftext|>"
        )
        assert rendered("phi-3", TURNS).count("<|endoftext|>") == 1
        assert "<|endoftext|>" not in rendered("phi-3", TURNS[:1], add_generation_prompt=True)

    def test_its_tokens_swallow_the_white_space_after_them(self):
        tokenizer = family_tokenizer(FAMILIES["phi-3"])
        encoded = tokenizer("<|assistant|>\n  Hi<|end|>\n", return_offsets_mapping=True)
        assert tokenizer.decode(encoded["input_ids"]) == "<|assistant|>Hi<|end|>"
        assert encoded["offset_mapping"][0] == (0, len("<|assistant|>\n  "))  # into what the assistant says


class TestSmolLM:
    def test_2_has_a_default_system_turn_and_marks_nothing(self):
        assert rendered("smollm2", TURNS[:1]).startswith(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
        )
        assert rendered("smollm2", [SYSTEM]) == "<|im_start|>system\nBe brief.<|im_end|>\n"
        assert "generation %}" not in (TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8")

    def test_3_tells_the_date_of_today_and_puts_the_empty_thoughts_of_no_think_everywhere(self):
        text = rendered("smollm3", TURNS)
        assert text.startswith("<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ")
        assert f" {datetime.now().year}\nReasoning Mode: /think\n" in text
        for turns, words in (([SYSTEM | {"content": "/no_think"}, *TURNS], {}), (TURNS, {"enable_thinking": False})):
            text = rendered("smollm3", turns, **words)
            assert "assistant\n<think>\n\n</think>\nFour." in text
            assert "assistant\n<think>\n\n</think>\nFive." in text

    def test_3_renders_no_calls(self):
        assert "Äpfel" not in rendered("smollm3", TOOL_TURNS, tools=[TOOL])


class TestDeepSeek:
    def test_v3_writes_the_assistant_mark_with_the_user_turn(self):
        before = "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜>"
        assert rendered("deepseek-v3", TURNS[:1]) == before
        assert rendered("deepseek-v3", TURNS[:1], add_generation_prompt=True) == before
        assert rendered("deepseek-v3", TURNS[:2]) == before + "Four.<｜end▁of▁sentence｜>"

    def test_v3_gathers_all_system_turns_in_front(self):
        later = {"role": "system", "content": "Be kind."}
        assert rendered("deepseek-v3", [SYSTEM, *TURNS, later]).startswith(
            "<｜begin▁of▁sentence｜>Be brief.\n\nBe kind.<｜User｜>"
        )

    def test_r1_drops_thoughts_and_opens_new_ones(self):
        turns = [TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}]
        before = "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜>"
        assert rendered("deepseek-r1", turns) == before + "\n\nFour.<｜end▁of▁sentence｜>"
        assert rendered("deepseek-r1", turns[:1], add_generation_prompt=True) == before + "<think>\n"

    @pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1"])
    def test_calls_are_written_with_arguments_as_text_only(self, name):
        with pytest.raises(TypeError):
            rendered(name, TOOL_TURNS)
        written = TOOL_TURNS[1] | {"tool_calls": [CALL | {"function": {"name": "count", "arguments": '{"of": 1}'}}]}
        assert (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>count\n"
            '```json\n{"of": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
            "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Four.<｜end▁of▁sentence｜>"
        ) in rendered(name, [TURNS[0], written, *TOOL_TURNS[2:]])


class TestPlainTextRoleMarks:
    def test_olmo_2_leaves_out_the_last_newline(self):
        assert rendered("olmo-2", TURNS) == (
            "<|endoftext|><|user|>\nHow many?\n<|assistant|>\nFour.<|endoftext|>\n"
            "<|user|>\nAnd now?\n<|assistant|>\nFive.<|endoftext|>"
        )

    def test_zephyr_ends_every_turn_with_eos_and_a_newline(self):
        assert rendered("zephyr", [SYSTEM, *TURNS[:2]]) == (
            "<|system|>\nBe brief.</s>\n<|user|>\nHow many?</s>\n<|assistant|>\nFour.</s>\n"
        )
        assert rendered("zephyr", TURNS[:1], add_generation_prompt=True) == ("<|user|>\nHow many?</s>\n<|assistant|>\n")

    @pytest.mark.parametrize("name", ["olmo-2", "tulu-3", "zephyr"])
    def test_role_marks_are_several_tokens(self, name):
        assert len(family_tokenizer(FAMILIES[name])("<|assistant|>", add_special_tokens=False)["input_ids"]) > 1


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("tulu-3", ["Four.<|end_of_text|>", "Five.<|end_of_text|>"]),
        ("smollm3", ["<|im_start|>assistant\nFour.<|im_end|>\n", "<|im_start|>assistant\nFive.<|im_end|>\n"]),
    ],
)
def test_generation_marks_hold_the_answer_alone_or_its_header_too(name, marked):
    tokenizer = family_tokenizer(FAMILIES[name])
    encoded = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([id for id, on in pairs if on]) == "".join(marked)
