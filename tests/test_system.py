"""data.system: the system prompt that training puts before conversations, and that generation begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import refusal, write_rows
from safetensors import safe_open

from lora_cli.data.chat.template import ChatTemplate, chat_template
from lora_cli.data.feed import open_feed
from lora_cli.data.prepare import prepare
from lora_cli.recipe import Recipe, load_recipe

SYSTEM = 'You answer for "Brio" {{ no }} {% raw %}, \\n in 2 lines:\nbriefly, and w\u00e4rmly \U0001f642.'
ASKED = {"role": "user", "content": "How long is the warranty?"}
ROW = {"messages": [ASKED, {"role": "assistant", "content": "Three years."}]}
OWN = {"messages": [{"role": "system", "content": "You are terse."}, *ROW["messages"]]}


def recipe_of(folder, train, **data):
    values = {"base_model": "none", "data": {"train": train, "template": "chatml", **data}}
    return Recipe.model_validate(values | {"train": {"max_steps": 1}, "output": str(folder / "run")})


def as_transformers(tokenizer, template, turns, **how):
    return tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template, **how)


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "gemma", "alpaca", "plain"])
@pytest.mark.parametrize("streaming", [False, True])
def test_it_goes_through_the_template_as_a_system_turn_does(tmp_path, tokenizer, name, streaming):
    instruction = {"instruction": ASKED["content"], "output": "Three years."}
    system = "You answer briefly.\nAnd \u00e4 \U0001f642."
    train = [str(write_rows(tmp_path / "a.jsonl", [ROW, OWN])), str(write_rows(tmp_path / "b.jsonl", [instruction]))]
    recipe = recipe_of(tmp_path, train, system=system, template=name, streaming=streaming, allow=["no_stop_token"])
    feed = open_feed(recipe, prepare(recipe, tokenizer), tokenizer)
    template = chat_template(tokenizer, name)
    given = {"role": "system", "content": system}
    for example, turns in zip(
        feed.first(3), [[given, *ROW["messages"]], OWN["messages"], [given, *ROW["messages"]]], strict=True
    ):
        whole = as_transformers(tokenizer, template.text, turns)
        first, last = example.spans[0][:2]
        ids = [int(id) for id in example.ids]
        assert tokenizer.decode(ids[:last]) == whole[: len(tokenizer.decode(ids[:last]))]
        prompt = as_transformers(tokenizer, template.text, turns[:-1], add_generation_prompt=True)
        assert ids[:first] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert feed.summary.system == system


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "gemma", "alpaca", "plain"])
@pytest.mark.parametrize("turns", [[ASKED], [{"role": "system", "content": "Other."}, ASKED]])
def test_other_programs_begin_with_it_by_the_template_that_is_kept(tokenizer, name, turns):
    template = chat_template(tokenizer, name)
    kept = template.own_text(SYSTEM)
    began = turns if len(turns) > 1 else [{"role": "system", "content": SYSTEM}, *turns]
    expected = template.render(began, "here", generation_prompt=True)
    assert as_transformers(tokenizer, kept, turns, add_generation_prompt=True) == expected
    assert ChatTemplate(kept, tokenizer, "kept").render(turns, "here", generation_prompt=True) == expected


def test_sources_may_have_another_one_or_none(tmp_path, tokenizer):
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", [ROW])) for name in "abc"]
    train = [paths[0], {"path": paths[1], "system": "You are B."}, {"path": paths[2], "system": ""}]
    data = prepare(recipe_of(tmp_path, train, system="You are A."), tokenizer)
    texts = [tokenizer.decode(example.ids) for example in data.train]
    assert [("You are A." in text, "You are B." in text) for text in texts] == [(1, 0), (0, 1), (0, 0)]
    assert data.summary.system == "You are A."  # the recipe's own
    assert 'the system prompt is "You are B."' in data.summary.formats[paths[1]]
    alone = prepare(recipe_of(tmp_path, train[1:]), tokenizer)
    assert alone.summary.system == "You are B."
    other = [train[1], {"path": paths[2], "system": "You are C."}]
    assert prepare(recipe_of(tmp_path, other), tokenizer).summary.system is None
    assert alone.fingerprint != prepare(recipe_of(tmp_path, [train[1], paths[2]], system="D"), tokenizer).fingerprint


LEAVES_OUT = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
REFUSES = LEAVES_OUT.replace(" if m.role != 'system' %}", " %}{{ raise_exception('no') if m.role == 'system' }}")


@pytest.mark.parametrize(("template", "why"), [(REFUSES, "refuses"), (LEAVES_OUT, "leaves out")])
def test_a_template_that_does_not_say_it_is_refused(tmp_path, tokenizer, template, why):
    (tmp_path / "own.jinja").write_text(template)
    path = str(write_rows(tmp_path / "a.jsonl", [ROW]))
    recipe = recipe_of(tmp_path, path, system="You are A.", template=str(tmp_path / "own.jinja"))
    error = refusal(lambda: prepare(recipe, tokenizer))
    assert f"own.jinja) {why} a system turn" in error.what
    assert error.where == "data.system"


def test_rows_that_go_through_no_template_are_named(tmp_path, tokenizer):
    text = str(write_rows(tmp_path / "text.jsonl", [{"text": "A note."}]))
    own = recipe_of(tmp_path, {"path": text, "system": "You are A."}, template=None)
    assert "format text, which goes through no chat template" in refusal(lambda: prepare(own, tokenizer)).what
    alone = recipe_of(tmp_path, text, system="You are A.", template=None)
    assert "data.system is set, but no row goes through" in refusal(lambda: prepare(alone, tokenizer)).what
    chat = str(write_rows(tmp_path / "chat.jsonl", [ROW]))
    both = prepare(recipe_of(tmp_path, [chat, text], system="You are A."), tokenizer)
    assert "data.system is not used: these rows go through no chat template" in both.summary.formats[text]


def test_a_run_speaks_as_it_was_trained(tmp_path, recipe_file, tiny_llama, lora):
    rows = str(write_rows(tmp_path / "chat.jsonl", [ROW | {"n": n} for n in range(4)]))
    path = recipe_file(data={"train": rows, "system": SYSTEM, "max_seq_len": 256})
    assert lora("train", path).code in (0, 3)
    run = load_recipe(path).output
    with safe_open(f"{run}/adapter/adapter_model.safetensors", "pt") as stored:
        assert stored.metadata()["system"] == SYSTEM
    said = lora("generate", run, ASKED["content"], "--max-new-tokens", 8, "--json")
    assert json.loads(said.out)["system"] == SYSTEM
    assert "the system prompt is that of training" in said.text
    given = lora("generate", run, ASKED["content"], "--max-new-tokens", 8, "--json", "--system", SYSTEM)
    assert json.loads(given.out) == json.loads(said.out)
    none = json.loads(lora("generate", run, ASKED["content"], "--max-new-tokens", 8, "--json", "--system", "").out)
    assert none["system"] is None
    card = Path(run, "adapter", "README.md").read_text(encoding="utf-8")
    assert "| system prompt | " in card
    merged = tmp_path / "merged"
    lora("merge", run, "--output", merged)
    assert json.loads((merged / "merge.json").read_text())["system"] == SYSTEM
    again = lora("generate", merged, ASKED["content"], "--max-new-tokens", 8, "--json")
    assert json.loads(again.out)["system"] == SYSTEM
