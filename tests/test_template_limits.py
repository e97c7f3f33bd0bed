"""Chat templates of strangers: whatever they ask for, rendering ends soon, small, and in words."""

# ruff: noqa: E501  # templates, each on a line
from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.ext
import pytest
from chat_families import TEMPLATES
from conftest import Said, write_rows
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_model import make_tokenizer

from lora_cli import limits
from lora_cli.data.chat.jinja import BoundedTemplate
from lora_cli.data.files.readers import Row
from lora_cli.data.gate import Encoded, Findings
from lora_cli.data.row_encoder import RowEncoder
from lora_cli.errors import LoraError
from lora_cli.limits import LimitReached
from lora_cli.recipe import DataRecipe

TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]


def doubled(step: str, first: str = "['a']", end: str = "{{ s60 }}") -> str:
    """s0, s1 = …s0…s0…, s2 = …s1…s1…, and so on."""
    steps = "".join(f"{{% set s{at + 1} = {step.replace('_', f's{at}')} %}}" for at in range(60))
    return f"{{% set s0 = {first} %}}{steps}{end}"


def again(step: str, first: str = "'aaaaaaaa'", end: str = "{{ n.s | length }}") -> str:
    return f"{{% set n = namespace(s={first}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{end}"


LONG = "{% set s = 'a' * 1000000 %}"
LOOP = "{% for a in range(99999) %}"
BOMBS = {
    "loops in loops": LOOP * 2 + "{% endfor %}{% endfor %}",
    "a loop whose filter takes nothing": LOOP + "{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a loop that only continues": LOOP * 2 + "{% continue %}{% endfor %}{% endfor %}",
    "lists in a loop": LOOP + "{{ range(99999) | list | length }}{% endfor %}",
    "selections in a loop": LOOP + "{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a macro whose argument doubles": "{% macro f(s) %}{% if s | length < 10 ** 15 %}{{ f(s + s) }}{% endif %}"
    "{% endmacro %}{{ f('aaaa') }}",
    "calls in calls": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "a width of %": "{{ '%1000000000d' % 1 }}",
    "a width of the filter format": "{{ '%1000000000d' | format(1) }}",
    "a width of the method format": "{{ '{:1000000000}'.format(1) }}",
    "a width by argument": "{{ '%*d' % (1000000000, 1) }}",
    "a width by inner field": "{{ '{:{}}'.format(1, 1000000000) }}",
    "doubling by +": again("{% set n.s = n.s + n.s %}"),
    "doubling by ~": again("{% set n.s = n.s ~ n.s %}"),
    "doubling by a block": again("{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}"),
    "doubling without a loop": doubled("_ ~ _", "'aaaa'", "{{ s60 | length }}"),
    "doubling in with": "{% with a='a' * 99 %}" + "{% with a=a + a %}" * 60 + "{{ a | length }}" + "{% endwith %}" * 61,
    "growing by replace": again("{% set n.s = n.s | replace('a', 'aaaaaaaaaaaaaaaaa') %}"),
    "growing by replace in a list": "{{ ['a' * 1000000] | replace('a', 'a' * 1000) | length }}",
    "growing by the method replace": again("{% set n.s = n.s.replace('a', 'aaaaaaaaaaaaaaaaa') %}"),
    "a filter block": "{% filter replace('a', 'a' * 100000) %}{{ 'a' * 100000 }}{% endfilter %}",
    "a text times a number": "{{ 'a' * 9000000000 }}",
    "a list times a number": "{{ ([1] * 900000000) | length }}",
    "a large power": "{{ 10 ** 10000000000 }}",
    "squares of squares": again("{% set n.s = n.s * n.s %}", "10", "{{ n.s % 7 }}"),
    "center": "{{ 'a' | center(900000000) }}",
    "ljust": "{{ 'a'.ljust(9000000000) }}",
    "zfill": "{{ 'a'.zfill(9000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ ('a\n' * 9000) | indent(900000000) }}",
    "indent of JSON": "{{ [[[[1]]]] | tojson(indent=900000000) }}",
    "batch": "{{ [1] | batch(900000000, 0) | list }}",
    "slice": "{{ [1] | slice(900000000) | list }}",
    "round": "{{ 1 | round(900000000, 'ceil') }}",
    "joining with a long text": LONG + "{{ range(99999) | join(s) | length }}",
    "the method join, of a generator": LONG + "{{ s.join(range(99999) | map('string')) | length }}",
    "lists in lists, written out": doubled("[_, _]"),
    "lists in lists, compared": doubled("[_, _]", end="{{ s60 == [s59, s59] }}"),
    "mappings in mappings, as JSON": doubled("{'a': _, 'b': _}", end="{{ s60 | tojson }}"),
    "mappings by dict()": again("{% set n.s = dict(a=n.s, b=n.s) %}", "{}", "{{ n.s }}"),
    "lists added to themselves": again("{% set n.s = n.s + n.s %}", "[1]"),
    "lists summed": "{{ ([[1] * 1000] * 9000) | sum(start=[]) | length }}",
    "a short text put out often": LOOP + "{{ 'a' * 10000 }}{% endfor %}",
    "a long text put out often": LONG + LOOP + "{{ s }}{% endfor %}",
    "an expression of many terms": LONG + "{{ " + "~".join(["s"] * 20_000) + " }}",
    "an expression of many sums": LONG + "{{ " + "~".join(["(s+s)"] * 9_000) + " }}",
    "comparing long texts": LONG + LOOP + "{% if s ~ 'a' == s ~ 'b' %}{% endif %}{% endfor %}",
    "splitting a long text": "{% set s = 'a' * 5000000 %}" + LOOP + "{% if s.split('a') %}{% endif %}{% endfor %}",
    "stripping many characters": LONG + LOOP + "{{ s.strip('b' * 1000000) | length }}{% endfor %}",
    "tags in a long text": "{{ ('<!---->' * 200000) | striptags }}",
    "wrapping with a long text": "{{ ('a ' * 9000) | wordwrap(1, wrapstring='a' * 1000000) }}",
    "addresses in a long text": "{{ ('http://a ' * 100000) | urlize }}",
    "a long template": "a" * 300_000,
}
TOO_DEEP = {
    "ifs": "{% if true %}" * 3000 + "x" + "{% endif %}" * 3000,
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "loops": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "negations": "{{ " + "not " * 9000 + "1 }}",
    "a whole number": "{{ " + "9" * 9000 + " }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_would_take_all_time_or_memory_is_refused_in_seconds(bomb: str) -> None:
    began = time.thread_time()
    with pytest.raises(LimitReached) as caught:
        BoundedTemplate(BOMBS[bomb], "bomb.jinja").render(messages=TURNS)
    assert time.thread_time() - began < 8
    assert caught.value.where == "bomb.jinja"
    assert caught.value.fix


@pytest.mark.parametrize("what", TOO_DEEP)
def test_a_template_nested_too_deeply_is_refused_in_words(what: str) -> None:
    with pytest.raises(LoraError, match=r"nested too deeply|not valid Jinja"):
        BoundedTemplate(TOO_DEEP[what], "deep.jinja")


def test_time_is_limited_where_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.0)
    with pytest.raises(LimitReached, match="takes more than 0 s"):
        BoundedTemplate(LOOP + "{% endfor %}", "slow").render()


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' + 'b' ~ 1 + 2 }}{{ [1] + [2] }}{{ 7 % 3 }}{{ 'x' * 3 }}{{ '%05.2f|%s' % (3.14159, 'z') }}{{ 2 ** 9 }}",
        "{{ '{:>6}{!r}'.format('a', 'b') }}{{ messages | map(attribute='role') | join(', ') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ range(5) | reverse | list }}",
        "{% set c = cycler(1, 2) %}{% for m in messages if m.role != 'x' %}{{ c.next() }}{{ loop.nextitem }}{% endfor %}",
        "{% for m in [[1, [2]]] recursive %}{{ m if m is number else loop(m) }}{% else %}none{% endfor %}",
        "{% macro f(a, b=2) %}{{ a }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}{{ f(1, 2, 3, c=4) }}"
        "{% call f(0) %}hi{% endcall %}",
        "{% set ns = namespace(a=[], b='') %}{% for m in messages %}{% set ns.a = ns.a + [m] %}{% set ns.b = ns.b ~ m.role %}"
        "{% endfor %}{{ ns.a | tojson(indent=2) }}{{ ns.b | upper | trim }}{{ ns.b | replace('r', 'RR') | indent(3, true) }}",
        "{{ messages[1:][::-1] }}{{ messages[0].items() | list }}{{ {'a': [1, none]} | dictsort }}{{ 'a,b'.split(',') }}",
        "{{ [3, 1, 2] | sort | join('-') }}{{ [1, 1] | unique | list }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2] | sum }}",
        "{{ messages | groupby('role') }}{{ 'ab' in 'cabd', 3 in [1], 'role' in messages[0], 1 == 1.0 }}{{ nothing is defined }}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}y{{ 1 }}{% endset %}{{ x }}{% with q = 5 %}{{ q }}{% endwith %}",
        "{{ messages[0].nope.deeper }}",
        "{{ messages[0]['content'].strip('?').title() }}{{ 'a\tb'.expandtabs(4) }}{{ ' x '.center(9) }}{{ messages.copy }}",
    ],
)
def test_what_is_rendered_is_what_jinja_renders(text: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    plain.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)

    def outcome(render: Callable[..., str]) -> str:
        try:
            return render(messages=TURNS)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert outcome(BoundedTemplate(text, "t").render) == outcome(plain.from_string(text).render)


@pytest.mark.parametrize("family", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_known_templates_are_far_from_the_limit(family: str) -> None:
    template = BoundedTemplate((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"), family)
    text = template.render(messages=TURNS * 300, bos_token="<s>", eos_token="</s>", tools=None)
    assert text.count("How many?") == 300
    assert template.steps < limits.TEMPLATE_STEPS / 4, template.steps


def test_check_and_generate_refuse_such_a_template_and_the_fix_works(
    lora: Callable[..., Said], model: Callable[..., Path], tmp_path: Path, recipe_file: Callable[..., Path]
) -> None:
    bombed = model({"chat_template.jinja": BOMBS["loops in loops"]})
    rows = write_rows(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 3)
    recipe = recipe_file(base_model=str(bombed), data={"train": str(rows)})
    asked = lora("train", recipe)
    assert asked.code == 2, asked.text
    assert "chat.jsonl: row 1, 2, 3: 3 rows that cannot be read" in asked.error
    assert "the chat template takes more than" in asked.error
    assert "data.template: plain" in asked.error
    assert lora("train", recipe, "--set", "data.template=plain").code == 0
    assert "takes more than" in lora("generate", "hi", "--chat", "--model", bombed).error


def encoded(template: str, contents: list[str]) -> tuple[list[Encoded], Findings]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [[{"role": "user", "content": content}, TURNS[1]] for content in contents]
    rows = [Row("chat.jsonl", number, {"messages": each}) for number, each in enumerate(turns, 1)]
    data = DataRecipe.model_validate({"train": "chat.jsonl"})
    findings = Findings()
    return list(RowEncoder(data, tokenizer, rows).encode(iter(rows), findings)), findings


SLOW_AT_BANG = "{% for m in messages %}{% if '!' in m.content %}" + LOOP * 2 + "{% endfor %}{% endfor %}{% endif %}"
SLOW_AT_BANG += "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
SLOW_AT_BANG += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_a_row_at_which_the_template_reaches_a_limit_is_a_finding_of_that_row() -> None:
    made, findings = encoded(SLOW_AT_BANG, ["a", "b!", "c", "d!", "e"])
    assert [each.example is not None for each in made] == [True, False, True, False, True]
    assert findings.places == {"malformed": [("chat.jsonl", 2, None), ("chat.jsonl", 4, None)]}
    assert re.search(r"takes more than 2\d\d,\d{3} steps", findings.errors["malformed"][0].what)
    assert "malformed" in findings.stopping()


def test_a_template_that_reaches_a_limit_at_every_row_stops_after_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitReached, match=r"takes more than 2\d\d,\d{3} steps") as caught:
        encoded(SLOW_AT_BANG, ["a!"] * 600)
    assert caught.value.where == "chat.jsonl: row 5"
    monkeypatch.setattr(limits, "TEMPLATE_MOST_STEPS", 300_000)  # rows that take very many: fewer
    with pytest.raises(LimitReached) as caught:
        encoded(SLOW_AT_BANG, ["a!"] * 600)
    assert caught.value.where == "chat.jsonl: row 3"


def test_leaving_early_does_not_wait_for_what_is_being_made() -> None:
    from lora_cli.data.row_encoder import ahead

    def slow() -> Any:
        yield 1
        time.sleep(8)
        yield 2

    items = ahead(slow(), 1)
    assert next(items) == 1
    began = time.monotonic()
    items.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 5


def test_a_long_row_may_take_more_steps() -> None:
    quadratic = "{% for a in messages %}{% for b in messages %}{{ 'x' if loop.last }}{% endfor %}{% endfor %}"
    many: list[dict[str, Any]] = TURNS * 400
    assert BoundedTemplate(quadratic, "t").render(messages=many) == "x" * 800
