"""Chat templates that behave as those of newer families: what ends a turn, and what a generation is prompted with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from chat_families import ENDOFTEXT, FAMILIES, HERMES, IM, Family, family_tokenizer

# Prompts with an open think block. Answers behind the last question have one, also without thoughts; earlier ones none.
QWEN_3_5 = """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- (messages[0].content if messages[0].role == 'system' else '') + '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if ns.last < 0 %}{{- raise_exception('No user query found in messages.') }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- elif m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
    {%- elif m.role == 'assistant' %}
        {%- set thoughts = m.reasoning_content or '' %}
        {%- set content = m.content | trim %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] | trim %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thoughts | trim + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n\n' if loop.first and content else '' if loop.first else '\n' }}
            {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<parameter=' + name + '>\n' + (value if value is string else value | tojson) }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}
{%- endif %}
"""

# Earlier answers end in <|end|> and lose their thoughts, the last ends in <|return|>, a call in <|call|>.
HARMONY = """
{{- '<|start|>system<|message|>You are ChatGPT.\nReasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- set first = messages[0] if messages[0].role == 'system' else none %}
{%- if first or tools %}
    {{- '<|start|>developer<|message|>' + (first.content if first else '') }}
    {%- for tool in tools or [] %}{{- '\ntype ' + tool.function.name + ' = ' + tool.function.description }}{%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(called='') %}
{%- for m in (messages[1:] if first else messages) %}
    {%- if m.role == 'user' %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {%- if m.tool_calls | length > 1 %}{{- raise_exception('one call a message') }}{%- endif %}
        {%- set ns.called = m.tool_calls[0].function.name %}
        {%- if m.content or m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.thinking or m.content) + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant to=functions.' + ns.called + '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and not add_generation_prompt and m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}
        {{- raise_exception('Unknown role ' + m.role) }}
    {%- endif %}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}
"""

# Two special tokens end an answer; the model stops at the second.
COHERE = """
{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You are in contextual safety mode.\n' }}
{{- (messages[0].content if messages[0].role == 'system' else '') }}
{%- for tool in tools or [] %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m.content + '<|END_TOOL_RESULT|>' }}
        {{- '<|END_OF_TURN_TOKEN|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
        {%- if m.tool_calls %}
            {{- ('<|START_THINKING|>' + m.content + '<|END_THINKING|>' if m.content else '') + '<|START_ACTION|>[' }}
            {%- for call in m.tool_calls %}
                {{- '' if loop.first else ', ' }}
                {{- '{"tool_name": "' + call.function.name + '", "parameters": ' }}
                {{- call.function.arguments | tojson + '}' }}
            {%- endfor %}
            {{- ']<|END_ACTION|>' }}
        {%- else %}
            {{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}
        {%- endif %}
        {{- '<|END_OF_TURN_TOKEN|>' }}
    {%- elif not loop.first %}
        {{- raise_exception('A system message has to be the first.') }}
    {%- endif %}
{%- endfor %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' if add_generation_prompt }}
"""

_ANY = replace(FAMILIES["zephyr"], wants_bos=False)
_COHERE = ("RESPONSE", "THINKING", "ACTION", "TOOL_RESULT")
_COHERE_SPECIAL = tuple(f"<|{edge}_{name}|>" for name in _COHERE for edge in ("START", "END"))
_COHERE_SPECIAL += ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_HARMONY_SPECIAL = tuple(f"<|{name}|>" for name in ("start", "end", "message", "channel", "call"))
MORE: dict[str, tuple[Family, str]] = {
    "qwen3.5": (
        replace(
            _ANY, name="qwen3.5", bos=None, eos="<|im_end|>", turn_end="<|im_end|>", special=(*IM, ENDOFTEXT),
            added=(*HERMES, "<tool_response>", "</tool_response>", "<think>", "</think>"), thinking=True, tools=True,
        ),
        QWEN_3_5,
    ),
    "harmony": (
        replace(
            _ANY, name="harmony", bos=None, eos="<|return|>", turn_end="<|return|>", special=_HARMONY_SPECIAL,
            thinking=True, tools=True,
        ),
        HARMONY,
    ),
    "cohere": (
        replace(
            _ANY, name="cohere", bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", special=_COHERE_SPECIAL,
            turn_end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", wants_bos=True, tools=True,
        ),
        COHERE,
    ),
}  # fmt: skip


@cache
def tokenizer_of(name: str) -> Any:
    """A small tokenizer with the template of a family, of these or of those in chat_families.py."""
    if name in FAMILIES:
        return family_tokenizer(FAMILIES[name])
    family, template = MORE[name]
    tokenizer = family_tokenizer(replace(family, name="zephyr"))
    tokenizer.chat_template = template
    return tokenizer
