"""`lora check`: what it shows is what is trained on."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import quiet_console, write_rows
from rich.console import Console
from typer.testing import CliRunner

from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.cli import app
from lora_cli.data.example import Example
from lora_cli.data.preview import as_text, tokens_of
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.planning.check import check, print_checked, write_page
from lora_cli.recipe import load_recipe
from lora_cli.studies import equalities
from lora_cli.training import micro_batches
from lora_cli.training.train import train

CHAT = [
    {"role": "user", "content": "How many Käse?"},
    {"role": "assistant", "content": "Four — five.\n\tYes"},
    {"role": "user", "content": "And 日本?"},
    {"role": "assistant", "content": "None."},
]


def checked_json(recipe: Path, *options: str) -> dict:
    result = CliRunner().invoke(app, ["check", str(recipe), "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def seen_in_training(monkeypatch):
    """(ids, targets) of every example of every micro-batch that a run trains on, taken from the model's own tensors."""
    seen: equalities.Trained = []
    real = micro_batches.training_loss

    def spy(model, batch, **options):
        if model.training:
            seen.extend(equalities.trained_rows([batch]))
        return real(model, batch, **options)

    monkeypatch.setattr(micro_batches, "training_loss", spy)
    return seen


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rows", ["sums", "chat"])
def test_what_check_shows_is_what_is_trained_on_token_for_token(
    recipe_file, sums, tmp_path, seen_in_training, rows, packing
):
    if rows == "chat":
        sums = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT[: 2 + 2 * (at % 2)]} for at in range(6)])
    settings = {"data": {"train": str(sums), "packing": packing, "max_seq_len": 200}, "train": {"epochs": 1}}
    shown = checked_json(recipe_file(**settings), "--show", "99")
    train(load_recipe(recipe_file(**settings | {"train": {"epochs": 1, "max_steps": 99}})), quiet_console())
    assert sorted(seen_in_training) == sorted(equalities.shown_rows(shown))
    assert shown["tokens"] == sum(len(ids) for ids, _ in seen_in_training)
    assert shown["target_tokens"] == sum(target >= 0 for _, targets in seen_in_training for target in targets)
    assert shown["target_tokens"] == sum(token["trained"] for row in shown["rows"] for token in row["tokens"])


def test_check_and_train_agree_on_the_fingerprint(recipe_file, run_recipe):
    shown = checked_json(recipe_file())
    run, _ = run_recipe()
    assert json.loads((run / "environment.json").read_text())["data_fingerprint"] == shown["fingerprint"]


def test_check_writes_nothing_unless_asked(recipe_file, tmp_path):
    before = set(tmp_path.rglob("*"))
    recipe = recipe_file()
    checked_json(recipe)
    assert set(tmp_path.rglob("*")) - before == {recipe}
    checked_json(recipe, "--prepare")
    (prepared,) = (tmp_path / "run").iterdir()
    assert prepared.name == "prepared"


def test_with_model_check_says_what_training_says_of_it(recipe_file, tmp_path):
    """Every line from the model to the memory plan, and nothing is written."""
    recipe = recipe_file()
    before = set(tmp_path.rglob("*"))
    said = checked_json(recipe, "--model")["model"]
    assert set(tmp_path.rglob("*")) == before
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output
    trained = " ".join(result.stderr.split())  # a terminal may wrap it
    assert [line.split()[0] for line in said if not line.startswith(" ")] == ["model", "adapter", "packing", "memory"]
    for line in said:
        assert " ".join(line.split()) in trained
    plain = CliRunner().invoke(app, ["check", str(recipe), "--model"])
    assert all(" ".join(line.split()) in " ".join(plain.stdout.split()) for line in said)


def test_with_model_check_refuses_what_training_refuses(recipe_file, monkeypatch):
    refusal = LoraError("Tiny is not causal: it sees the tokens that it is to predict")
    monkeypatch.setattr("lora_cli.training.passes.require_causal", lambda *_: (_ for _ in ()).throw(refusal))
    result = CliRunner().invoke(app, ["check", str(recipe_file()), "--model"])
    assert "not causal" in str(result.exception)


def test_train_uses_what_check_prepared(recipe_file, run_recipe, monkeypatch):
    checked_json(recipe_file(), "--prepare")
    monkeypatch.setattr("lora_cli.data.prepare.Preparation.build", lambda *_: pytest.fail("prepared again"))
    run_recipe()


def test_json_names_rows_and_findings(recipe_file, tmp_path):
    rows = [{"prompt": "a", "completion": str(at)} for at in range(4)]
    data = write_rows(tmp_path / "bad.jsonl", [*rows, rows[1], {"prompt": "b", "completion": ""}])
    recipe = recipe_file(data={"train": str(data)})
    result = CliRunner().invoke(app, ["check", str(recipe), "--json"])
    assert isinstance(result.exception, CheckFailed)
    assert result.exception.exit_code == 3
    shown = result.exception.result
    assert shown is not None
    assert not shown["ok"]
    assert [(each["kind"], each["count"], each["rows"]) for each in shown["findings"]] == [
        ("no_target", 1, [6]),
        ("duplicate", 1, [5]),
    ]
    assert all(each["fix"] for each in shown["findings"])
    assert [(row["source"], row["row"]) for row in shown["rows"]] == [(str(data), number) for number in (1, 2, 3)]


def test_layers_and_parameters_are_those_of_training(recipe_file, run_recipe):
    shown = checked_json(recipe_file())
    _, report = run_recipe()
    assert (shown["layers"], shown["trained_parameters"]) == (report["adapted_layers"], report["trained_parameters"])


def test_a_layer_that_matches_nothing_is_found_before_training(recipe_file):
    with pytest.raises(LoraError, match="q_prj"):
        check(load_recipe(recipe_file(adapter={"target_modules": ["q_prj"]})))


# ── how it looks ────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_spell_the_example_and_the_first_is_no_target(tokenizer):
    ids = tokenizer("Ünï 日本 <|im_end|>")["input_ids"]
    tokens = tokens_of(Example(ids, [(0, len(ids), 1.0)]), tokenizer)
    assert [token.id for token in tokens] == ids
    assert [token.trained for token in tokens] == [False] + [True] * (len(ids) - 1)
    assert [token.special for token in tokens] == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("text", ["plain words", "Käse 日本 🎉\n\tx", "a\r\x1b[31mred\x7f"])
def test_without_colour_the_trained_part_stands_in_brackets(tokenizer, text):
    prompt, answer = tokenizer("ask")["input_ids"], tokenizer(text)["input_ids"]
    example = Example([*prompt, *answer, 0], [(len(prompt), len(prompt) + len(answer) + 1, 1.0)])
    shown = as_text(example, tokenizer, colour=False).plain
    inside = re.fullmatch(r"ask⟦(.*)⟧", shown, re.DOTALL)
    assert inside is not None
    seen = inside[1].replace("↵\n", "\n").replace("⇥   ", "\t").replace("␍", "\r").replace("␡", "\x7f")
    assert "".join(chr(ord(c) - 0x2400) if 0x2400 <= ord(c) < 0x2420 else c for c in seen) == text + "<|endoftext|>"
    assert "\x1b" not in shown


def test_with_colour_trained_tokens_have_another_style(tokenizer):
    example = Example(tokenizer("ask it")["input_ids"] + [0], [(2, 99, 1.0)])
    text = as_text(example, tokenizer, colour=True)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style.bgcolor)
    assert green == tokenizer.decode(list(example.ids)[2:])


class Page(HTMLParser):
    """The tokens of a page: (classes, title, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[list[str]] = []
        self.inside = False
        self.opened: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in ("pre", "table", "style", "title"):
            self.opened.append(tag)
        if tag == "span" and "title" in dict(attrs):
            self.tokens.append([dict(attrs).get("class") or "", dict(attrs)["title"] or "", ""])
            self.inside = True

    def handle_endtag(self, tag):
        if tag == "span":
            self.inside = False
        if tag in ("pre", "table", "style", "title"):
            assert self.opened.pop() == tag

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][2] += data


def test_page_holds_every_token_with_its_mask_and_no_markup_of_the_data(recipe_file, tmp_path, tiny_llama):
    rows = [{"prompt": "<script>alert('x')</script> & ", "completion": "<b>1</b>"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    checked = check(load_recipe(recipe_file(data={"train": str(data)})))
    write_page(checked, tmp_path / "page.html", 3)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in re.sub(r"http-equiv", "", text)  # one file that needs no other
    page = Page()
    page.feed(text)
    example = checked.feed.first(1)[0]
    assert "".join(token[2] for token in page.tokens) == rows[0]["prompt"] + rows[0]["completion"] + "<|endoftext|>"
    assert ["t" in token[0].split() for token in page.tokens] == example.trained.tolist()
    tokenizer = load_tokenizer(find_base(str(tiny_llama)))
    assert [int(token[1]) for token in page.tokens] == [int(id) for id in example.ids]
    assert "s" in page.tokens[-1][0].split()
    assert page.tokens[-1][2] == tokenizer.eos_token


def test_page_never_replaces_something_else(recipe_file, tmp_path):
    checked = check(load_recipe(recipe_file()))
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page")
    with pytest.raises(LoraError, match="refusing to overwrite"):
        write_page(checked, mine, 1)
    assert mine.read_text() == "<p>my own page"
    write_page(checked, tmp_path / "page.html", 1)
    write_page(checked, tmp_path / "page.html", 2)  # its own earlier page it may


def test_summary_names_every_finding_with_rows_and_fix(recipe_file, tmp_path):
    rows = [{"prompt": "a", "completion": str(at)} for at in range(4)]
    data = write_rows(tmp_path / "bad.jsonl", [*rows, rows[1], {"prompt": "b", "completion": ""}])
    checked = check(load_recipe(recipe_file(data={"train": str(data)})))
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_checked(checked, console, 1)
    console.file.close()
    text = console.export_text()
    assert re.search(r"stops\s+1\s+rows with no target token\s+6\s+give", text)
    assert re.search(r"note\s+1\s+rows that repeat an earlier row\s+5\s+remove", text)
    assert "5 examples an epoch" in text


def test_no_weight_is_read(recipe_file, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    checked = check(load_recipe(recipe_file()))
    assert len(checked.targets) == 8


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": 2}, "only 2 optimizer steps"),
        ({"max_steps": None, "epochs": 1, "gradient_accumulation_steps": 16}, "only 1 optimizer step,"),
        ({"max_steps": None, "epochs": 0.5, "micro_batch_size": 1}, "only "),
        ({"max_steps": None, "epochs": 1, "micro_batch_size": "auto", "batch_size": 8}, "only "),
        ({"max_steps": None, "epochs": 2, "micro_batch_size": 16, "gradient_accumulation_steps": 1}, "only "),
        ({"max_steps": 30, "epochs": 1, "micro_batch_size": 16}, "only "),
        ({"max_steps": 20}, None),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_few_steps_are_a_note_whose_fix_ends_it(recipe_file, settings, told, packing):
    def notes(train: dict) -> tuple[int, list[str]]:
        train = {name: value for name, value in train.items() if value is not None}
        values = yaml.safe_load(recipe_file(data={"packing": packing}, train=train).read_text())
        if "max_steps" not in train:
            del values["train"]["max_steps"]
        path = recipe_file()
        path.write_text(yaml.safe_dump(values))
        found = check(load_recipe(path))
        return found.feed.total_steps, [line for line in found.feed.lines() if line.startswith("note: ")]

    steps, said = notes(settings)
    assert bool(said) == (told is not None) == (steps < 20)
    if not said:
        return
    assert said[0].startswith(f"note: {told}")
    written = {name: int(value) for name, value in re.findall(r"train\.(\w+): (\d+)", said[0])}
    promised = re.search(r"for (\d+) steps", said[0])
    assert promised is not None
    assert notes(settings | written) == (int(promised[1]), [])


def test_few_steps_of_a_stream_are_a_note_too(recipe_file):
    path = recipe_file(data={"streaming": True}, train={"max_steps": 3})
    assert "write train.max_steps: 40 or more" in check(load_recipe(path)).feed.lines()[-1]
    document = checked_json(path)
    assert document["steps"] == 3


def test_the_adapter_is_compared_with_the_data(recipe_file):
    checked = check(load_recipe(recipe_file()))
    targets = checked.feed.summary.train.target_tokens

    def said(parameters: int) -> str:
        console = Console(record=True, width=200, file=io.StringIO())
        print_checked(replace(checked, parameters=parameters), console, 0)
        return console.export_text()

    assert f"{4 * targets:,} trained parameters for {targets} target tokens" in said(4 * targets)
    assert "more target tokens" not in said(targets)
    assert "note     more target tokens than trained parameters: a higher adapter.rank" in said(targets - 1)
