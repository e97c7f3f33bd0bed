"""`lora init`: the recipe it writes is right, its comments are true, and its estimate of memory is the arithmetic's."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from conftest import quiet_console, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub import FakeHub, hub  # noqa: F401  # a fixture
from tiny_model import make_tokenizer, save_tiny

from lora_cli.adapters.attach import attach
from lora_cli.adapters.targets import find_targets
from lora_cli.base.activations import ActivationPlan
from lora_cli.base.attention import attention_implementation
from lora_cli.base.linear import held_bytes
from lora_cli.base.load import load_model, load_tokenizer
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.source import BaseSource, find_base
from lora_cli.cli.plan import _meanings
from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.data.prepare import prepare
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import summed_loss
from lora_cli.evaluation.quantization_cost import Costs
from lora_cli.planning import choices, first_recipe, survey
from lora_cli.planning.blocks import Block, measure_blocks
from lora_cli.planning.choices import Device, choose_adapter, choose_learning_rate, choose_sizes, choose_validation
from lora_cli.planning.first_recipe import write_first_recipe
from lora_cli.planning.memory import GIB, ModelShape, estimate_memory, offloaded_bytes, parse_size, shape_of
from lora_cli.planning.reading import Reading, _spelled, choose_reading
from lora_cli.planning.skeleton import BaseModel, look_at_model
from lora_cli.planning.survey import DataSurvey, look_at_rows
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.training.train import train

IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CPU = torch.device("cpu")


def sums(number: int) -> list[tuple[str, str]]:
    """Questions and answers, all different, of varied length."""
    return [
        (f"What is {at} plus {3 * at}?{' Think.' * (at % 4)}\n", f"{at} plus {3 * at} is {4 * at}.")
        for at in range(number)
    ]


def prompts(place: Path, number: int = 170) -> Path:
    rows = [{"prompt": asked, "completion": answer} for asked, answer in sums(number)]
    return write_rows(place / "sums.jsonl", rows)


def chats(place: Path) -> Path:
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in sums(40)]
    return write_rows(place / "chats.jsonl", [{"messages": each} for each in turns])


def alpaca(place: Path) -> Path:
    """As the original data set has it: with the rendered text beside the parts."""
    rows = [{"instruction": a, "input": "", "output": b, "text": f"### {a} {b}"} for a, b in sums(40)]
    (place / "alpaca.json").write_text(json.dumps(rows))
    return place / "alpaca.json"


def questions(place: Path) -> Path:
    return write_rows(
        place / "qa.jsonl", [{"id": str(at), "question": a, "answer": b} for at, (a, b) in enumerate(sums(40))]
    )


def with_context(place: Path) -> Path:
    rows = [{"question": a, "context": f"CREATE TABLE t{len(b)}", "answer": b} for a, b in sums(40)]
    return write_rows(place / "sql.jsonl", rows)


def dolly(place: Path) -> Path:
    rows = [{"instruction": a, "context": "", "response": b, "category": "sums"} for a, b in sums(40)]
    return write_rows(place / "dolly.jsonl", rows)


def books(place: Path) -> Path:
    folder = place / "books"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(" ".join(f"{a}{b}" for a, b in sums(30 + number)))
    return folder


DATA = {  # how rows look → (what makes them, format, settings of the data section that they need)
    "prompts": (prompts, "completion", {}),
    "chats": (chats, "chat", {}),
    "alpaca": (alpaca, "instruction", {"format": "instruction"}),
    "questions": (
        questions, "instruction",
        {"format": "instruction", "columns": {"instruction": "question", "output": "answer"}},
    ),
    "context": (
        with_context, "instruction", {"columns": {"instruction": "question", "output": "answer", "input": "context"}},
    ),
    "dolly": (dolly, "instruction", {"columns": {"output": "response", "input": "context"}}),
    "books": (books, "text", {"too_long": "split"}),
}  # fmt: skip


def written(place: Path, model: Path | str, data: Path | str, gpu: str | None = "8GB", name: str = "r.yaml") -> Recipe:
    return write_first_recipe(str(model), [str(data)], place / name, gpu=gpu).recipe


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in\n{text}"
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("kind", DATA)
def test_what_is_written_trains(kind: str, model: str, tmp_path: Path, request: pytest.FixtureRequest):
    make, data_format, needed = DATA[kind]
    folder = request.getfixturevalue(model)
    written(tmp_path, folder, make(tmp_path))
    own = yaml.safe_load((tmp_path / "r.yaml").read_text())
    given = {key: value for key, value in own["data"].items() if key in ("format", "columns", "too_long", "template")}
    assert given == needed
    recipe = load_recipe(tmp_path / "r.yaml", ["train.max_steps=2"])
    data = prepare(recipe, load_tokenizer(find_base(str(folder))))
    assert [form.split(" ")[0] for form in data.summary.formats.values()] == [data_format]
    report = train(recipe, quiet_console())
    assert report["learned"]
    assert report["steps"] == 2


def test_every_number_of_the_comments_is_true(tiny_llama: Path, tmp_path: Path, tokenizer: Any):
    data = prompts(tmp_path)
    recipe = written(tmp_path, tiny_llama, data)
    text = (tmp_path / "r.yaml").read_text()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    answers = [len(tokenizer(row["completion"]).input_ids) + 1 for row in rows]  # and the end token
    lengths = sorted(len(tokenizer(row["prompt"]).input_ids) + n for row, n in zip(rows, answers, strict=True))
    assert f"170 rows of prompt and completion: {sum(lengths):,} tokens, {sum(answers):,} of them trained" in text
    most = int(number(r"95 % of your rows have at most ([\d,]+) tokens", text))
    assert sum(length <= most for length in lengths) >= 0.95 * 170 > sum(length < most for length in lengths)
    assert number(r"the longest has ([\d,]+)", text) == lengths[-1]
    assert recipe.data.max_seq_len == -(-lengths[-1] // 64) * 64
    assert number(r"validation: 0.05  # (\d+) examples held out", text) == 8
    report = train(recipe, quiet_console())
    assert number(r"three passes, ([\d,]+) steps", text) == report["steps"]
    assert number(r"about ([\d,]+) tokens a step", text) == round(report["tokens"] / report["steps"])
    assert number(r"rank: 16  # ([\d,]+) trained parameters", text) == report["trained_parameters"]
    assert number(r"(\d+) layers; QLoRA", text) == report["adapted_layers"]
    examples = 8192 / (sum(lengths) / 170)
    assert number(r"√\(([\d,]+) examples a full step / 128\)", text) == round(examples)
    assert recipe.train.learning_rate == choose_learning_rate("llama", int(number(r"width (\d+)", text)), examples)[0]
    assert recipe.adapter.alpha == 32
    evaluations = (Path(recipe.output) / "metrics.jsonl").read_text().count("validation_loss")
    assert 9 <= evaluations <= 12, "about ten times"
    model = load_model(find_base(str(tiny_llama)), quantization="none", dtype=torch.float32, device=CPU)
    assert number(r"([\d,]+) parameters \(", text) == sum(p.numel() for p in model.parameters())


def test_numbers_of_long_texts(tiny_llama: Path, tmp_path: Path, tokenizer: Any):
    folder = books(tmp_path)
    recipe = written(tmp_path, tiny_llama, folder)
    text = (tmp_path / "r.yaml").read_text()
    lengths = [len(tokenizer(file.read_text()).input_ids) + 1 for file in sorted(folder.iterdir())]
    assert min(lengths) > 256, "the tiny model sees 256"
    assert recipe.data.max_seq_len == 256
    assert f"the longest has {max(lengths):,}; the model sees 256 at most" in text
    assert f"3 rows of text: {sum(lengths):,} tokens" in text
    # Every piece but the first of a text begins with a token of context: 255 new ones each.
    pieces = sum(1 + -(-(length - 256) // 255) for length in lengths)
    assert f"3 of 3 texts are longer: cut into pieces, which makes {pieces:,} examples" in text
    assert "No validation: 3 different rows are too few to hold some out (from 50 on)" in text
    assert recipe.data.validation is None


def test_rows_that_the_model_cannot_see_are_counted_and_left_out(tiny_llama: Path, tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": a * (30 if at % 10 == 0 else 1), "completion": b} for at, (a, b) in enumerate(sums(40))]
    recipe = written(tmp_path, tiny_llama, write_rows(tmp_path / "rows.jsonl", rows))
    text = (tmp_path / "r.yaml").read_text()
    lengths = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows]
    longer = sum(length > 256 for length in lengths)
    assert longer
    assert f"too_long: drop  # {longer} of 40 rows are longer: left out" in text
    assert recipe.data.max_seq_len == -(-max(length for length in lengths if length <= 256) // 64) * 64


def test_rows_of_which_most_are_too_long_are_refused(tiny_llama: Path, tmp_path: Path):
    rows = [{"prompt": a * 40, "completion": b} for a, b in sums(9)] + [{"prompt": "1 + 1 =", "completion": " 2"}]
    with pytest.raises(LoraError, match="9 of 10 rows are longer than the 256 tokens that") as error:
        written(tmp_path, tiny_llama, write_rows(tmp_path / "rows.jsonl", rows))
    assert "fix: use a model that sees more" in str(error.value)
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize("kind", DATA)
def test_it_is_short(kind: str, tiny_llama: Path, tmp_path: Path):
    written(tmp_path, tiny_llama, DATA[kind][0](tmp_path))
    lines = (tmp_path / "r.yaml").read_text().splitlines()
    assert 15 <= sum(not line.lstrip().startswith("#") for line in lines) <= 25
    assert max(map(len, lines)) <= 120


# ── templates, columns, validation ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bare_model(tiny_llama: Path, tmp_path: Path) -> Callable[[bool], Path]:
    """A model without a chat template; with or without ChatML's turn marks as special tokens."""

    def make(marks: bool) -> Path:
        folder = tmp_path / f"bare-{marks}"
        shutil.copytree(tiny_llama, folder)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if not marks:
            stored = json.loads((folder / "tokenizer.json").read_text())
            stored["added_tokens"] = [each for each in stored["added_tokens"] if "im_" not in each["content"]]
            (folder / "tokenizer.json").write_text(json.dumps(stored))
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "marks", "template"),
    [(chats, True, "chatml"), (alpaca, True, "chatml"), (chats, False, "plain"), (alpaca, False, "alpaca")],
)
def test_a_template_where_the_model_has_none(
    make: Callable[[Path], Path], marks: bool, template: str, bare_model: Callable[[bool], Path], tmp_path: Path
):
    recipe = written(tmp_path, bare_model(marks), make(tmp_path))
    assert recipe.data.template == template
    assert "the model has no chat template" in (tmp_path / "r.yaml").read_text()


def test_only_last_answers_where_the_template_renders_earlier_ones_otherwise(tiny_llama: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    data = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"messages": [{"role": role, "content": f"{role} {at}."} for role in ("user", "assistant") * turns]}
            for at, turns in enumerate([1, 2] * 100)
        ],
    )
    recipe = written(tmp_path, model, data)
    assert recipe.data.train_on == "last_assistant"
    assert "renders earlier answers in another way" in (tmp_path / "r.yaml").read_text()
    single = write_rows(tmp_path / "single.jsonl", [json.loads(line) for line in data.read_text().splitlines()[::2]])
    (tmp_path / "r.yaml").unlink()
    assert written(tmp_path, model, single).data.train_on is None


def test_no_template_where_none_is_needed(bare_model: Callable[[bool], Path], tmp_path: Path):
    assert written(tmp_path, bare_model(True), prompts(tmp_path)).data.template is None


@pytest.mark.parametrize(
    ("columns", "name", "mapped"),
    [
        ("text", "text", {}),
        ("messages tools", "chat", {}),
        ("conversations", "chat", {}),
        ("dialog", "chat", {"messages": "dialog"}),
        ("prompt chosen rejected", "completion", {"completion": "chosen"}),
        ("query response", "completion", {"prompt": "query", "completion": "response"}),
        ("prompt context response", "instruction", {"instruction": "prompt", "output": "response", "input": "context"}),
        ("instruction answer", "instruction", {"output": "answer"}),
        ("article", "text", {"text": "article"}),
        ("prompt completion messages", "chat", {}),
        ("prompt completion text", "completion", {}),
    ],
)
def test_columns_and_what_they_mean(columns: str, name: str, mapped: dict[str, str]):
    row = survey.Row("f", 1, dict.fromkeys(columns.split(), "x"))
    reading = choose_reading([row])
    assert (reading.name, reading.columns) == (name, mapped)
    assert (reading.wanted != "auto") == (columns in ("prompt completion messages", "prompt completion text"))


@pytest.mark.parametrize(
    "columns",
    [
        *["Question Answer", "question answer", "Q A", "q a", "input output", "Input Output", "user assistant"],
        *["User Assistant", "prompt response", "query response", "question response", "problem solution"],
    ],
)
def test_questions_and_answers_go_through_the_template_of_a_model_that_has_one(columns: str):
    asked, answer = columns.split(" ")
    rows = [survey.Row("f", 1, {asked: "x", answer: "y", "Rating": "5"})]
    reading = choose_reading(rows, template=True)
    given = {"instruction": asked, "output": answer}
    assert (reading.name, reading.wanted, reading.columns) == ("instruction", "instruction", given)
    assert reading.unused == ("Rating",)
    assert "chat template" in reading.why
    again = yaml.safe_load(reading.why[reading.why.index("{") :])  # what to write to train without
    assert choose_reading(rows).columns == {name: column for name, column in again.items() if name != column}
    assert choose_reading(rows).name == "completion"


@pytest.mark.parametrize("columns", ["prompt completion", "Prompt Completion"])
def test_prompts_and_completions_are_trained_as_they_are(columns: str):
    rows = [survey.Row("f", 1, dict.fromkeys(columns.split(), "x"))]
    assert choose_reading(rows, template=True).name == "completion"


@pytest.mark.parametrize(
    ("columns", "named", "template", "read"),
    [
        ("Frage Antwort", "question=Frage,answer=Antwort", True, {"instruction": "Frage", "output": "Antwort"}),
        ("Frage Antwort", "question=frage, answer= ANTWORT", True, {"instruction": "Frage", "output": "Antwort"}),
        ("Frage Antwort", "question=Frage,answer=Antwort", False, {"prompt": "Frage", "completion": "Antwort"}),
        ("Frage Antwort", "prompt=Frage,completion=Antwort", True, {"prompt": "Frage", "completion": "Antwort"}),
        ("a b", "input=a,output=b", True, {"instruction": "a", "output": "b"}),
        ("a b c", "question=a,answer=b,input=c", False, {"instruction": "a", "output": "b", "input": "c"}),
        ("title body", "user=title,assistant=body", True, {"instruction": "title", "output": "body"}),
        ("title body", "text=body", True, {"text": "body"}),
        ("question answer", "question=answer,answer=question", True, {"instruction": "answer", "output": "question"}),
    ],
)
def test_columns_that_are_named(columns: str, named: str, template: bool, read: dict[str, str]):
    rows = [survey.Row("f", 1, dict.fromkeys(columns.split(), "x"))]
    reading = choose_reading(rows, _spelled(_meanings(named), rows), template=template)
    assert reading.columns == read
    assert reading.wanted == reading.name == next(iter(NAMES[each] for each in read if each in NAMES))


NAMES = {"instruction": "instruction", "prompt": "completion", "text": "text"}


@pytest.mark.parametrize("text", ["", "Frage", "question", "question=", "=a", "frage=Frage", "question=a,,answer"])
def test_columns_that_do_not_say_what_they_mean_are_refused_with_an_example(text: str):
    with pytest.raises(LoraError, match="does not say what columns mean") as error:
        _meanings(text)
    assert _meanings(str(error.value.fix).rpartition(" ")[2]) == {"question": "Frage", "answer": "Antwort"}


UNREAD = {
    "nothing known": [{"a": "x", "b": "y"}],
    "a title": [{"id": "17", "title": "What is it?", "body": "It is this, and that."}],
    "names with commas": [{"What, exactly?": "this", 'So "it" is': "that", "n": "3"}],
    "one text": [{"a": "x y z", "n": "17"}],
    "half said": [{"Frage": "Was?", "Antwort": "Das."}],
}


@pytest.mark.parametrize("case", UNREAD)
def test_columns_that_mean_nothing_are_refused_with_a_command_that_works(
    case: str, tmp_path: Path, tiny_llama: Path, lora: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my rows.jsonl", UNREAD[case])
    half = ["--columns", "question=Frage"] if case == "half said" else []
    wrong = lora("init", str(tiny_llama), "my rows.jsonl", "--output", "r.yaml", *half)
    assert wrong.code == 2
    fix = shlex.split(wrong.text.split("such as: ")[1].strip())
    assert fix[:2] == ["lora", "init"]
    assert lora(*fix[1:]).code == 0
    columns = load_recipe(tmp_path / "r.yaml").data.columns.values()
    assert {*columns} <= {*UNREAD[case][0]}
    assert len(columns) == (1 if case == "one text" else 2)


def test_a_title_above_the_header_is_said(tmp_path: Path, tiny_llama: Path):
    (tmp_path / "faq.csv").write_text("Our FAQ,,\nQuestion,Answer,Rating\nWhat?,This.,5\n")
    with pytest.raises(LoraError) as error:
        written(tmp_path, tiny_llama, tmp_path / "faq.csv")
    found = re.fullmatch(r"remove the first line: `(.+)`, and name (.+)", str(error.value.fix))
    assert found, error.value
    subprocess.run(found[1], shell=True, check=True)
    assert written(tmp_path, tiny_llama, found[2]).data.columns == {"instruction": "Question", "output": "Answer"}


def test_several_sources_in_one_recipe(tmp_path: Path, tiny_llama: Path):
    """A sheet, chats and notes, each read in its own way, and trained."""
    (tmp_path / "faq.csv").write_text("Question;Answer\n" + "".join(f"{a.strip()};{b}\n" for a, b in sums(30)))
    (tmp_path / "notes.txt").write_text("It is so. " * 20)
    data = [str(tmp_path / "faq.csv"), str(chats(tmp_path)), str(tmp_path / "notes.txt")]
    made = write_first_recipe(str(tiny_llama), data, tmp_path / "r.yaml", gpu="8GB").recipe
    assert [each.path for each in made.data.train] == data
    assert (made.data.format, made.data.columns) == ("auto", {})
    own = {"format": "instruction", "columns": {"instruction": "Question", "output": "Answer"}}
    assert [each.own for each in made.data.train] == [own, {}, {}]
    recipe = load_recipe(tmp_path / "r.yaml", ["train.max_steps=2"])
    prepared = prepare(recipe, load_tokenizer(find_base(str(tiny_llama))))
    assert [form.split(" ")[0] for form in prepared.summary.formats.values()] == ["instruction", "chat", "text"]
    assert number(r"([\d,]+) rows of", (tmp_path / "r.yaml").read_text()) == 71
    assert train(recipe, quiet_console())["learned"]


def test_several_sources_of_one_kind_say_it_once_and_those_that_differ_each_for_itself(
    tmp_path: Path, tiny_llama: Path
):
    for name, header in (("a", "Question,Answer"), ("b", "Question,Answer"), ("c", "Q,A"), ("d", "question,Answer")):
        (tmp_path / f"{name}.csv").write_text(f"{header}\nWhat is {name}?,It is {name}.\n")
    made = write_first_recipe(str(tiny_llama), [str(tmp_path / f"{n}.csv") for n in "ab"], tmp_path / "r.yaml")
    assert (made.recipe.data.format, len(made.recipe.data.train)) == ("instruction", 2)
    other = write_first_recipe(str(tiny_llama), [str(tmp_path / f"{n}.csv") for n in "ac"], tmp_path / "s.yaml")
    assert [each.own["columns"]["instruction"] for each in other.recipe.data.train] == ["Question", "Q"]
    assert other.recipe.data.columns == {}


def test_of_several_large_sources_a_sample_of_each_is_tokenized(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(survey, "WHOLE_BYTES", 50_000)
    monkeypatch.setattr(survey, "SAMPLE_ROWS", 300)
    (tmp_path / "a").mkdir()
    data = [str(prompts(tmp_path, 3000)), str(questions(tmp_path / "a"))]
    write_first_recipe(str(tiny_llama), data, tmp_path / "r.yaml", gpu="8GB")
    assert "# 3,040 rows of" in (tmp_path / "r.yaml").read_text()


def test_a_column_with_a_name_that_yaml_does_not_like(tmp_path: Path, tiny_llama: Path):
    rows = [{"instruction": a, "output": b, "text": "", "x: [\u2028# \n\x00": "?"} for a, b in sums(5)]
    assert written(tmp_path, tiny_llama, write_rows(tmp_path / "rows.jsonl", rows)).data.format == "instruction"


@given(rows=st.integers(1, 10**9), distinct=st.integers(1, 10**9))
def test_held_out_rows_are_enough_and_not_too_many(rows: int, distinct: int):
    share = choose_validation(rows, min(rows, distinct))
    if share is None:
        assert min(rows, distinct) < 50
    else:
        assert share <= max(0.05, 8 / min(rows, distinct) + 0.01)
        assert 8 <= round(share * rows) <= max(1500, 0.17 * rows)


def test_equal_rows_are_not_held_out(tiny_llama: Path, tmp_path: Path):
    """They stay together, so a share of them can be all or none."""
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}] * 200)
    result = write_first_recipe(str(tiny_llama), [str(data)], tmp_path / "r.yaml", gpu="8GB")
    assert result.recipe.data.validation is None
    assert "199 rows that repeat an earlier row" in result.notes[0]


# ── paths and files ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", ["rows.jsonl", "my $rows {1}.jsonl", "~rows.jsonl", "17.jsonl", "a: #b.jsonl"])
def test_paths_start_at_the_recipe(
    name: str, absolute: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder in ("here", "there/recipes", "data"):
        (tmp_path / folder).mkdir(parents=True)
    data = tmp_path / "data" / name
    prompts(tmp_path).rename(data)
    shutil.copytree(tiny_llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "here")
    place = tmp_path if absolute else Path("..")
    path = Path("../there/recipes/r.yaml")
    recipe = write_first_recipe(str(place / "model"), [str(place / "data" / name)], path, gpu="8GB").recipe
    monkeypatch.chdir("/")
    again = load_recipe(tmp_path / "there/recipes/r.yaml")
    assert again == recipe
    assert (again.base_model, again.data.train[0].path) == (str(tmp_path / "model"), str(data))
    assert Path(again.output).parent == tmp_path / "there/recipes/runs"
    text = yaml.safe_load((tmp_path / "there/recipes/r.yaml").read_text())
    assert text["base_model"].startswith(str(tmp_path) if absolute else "../../model")


def test_a_glob_and_a_run_folder_that_is_taken(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path)
    first = written(tmp_path, tiny_llama, "*.jsonl")
    assert Path(first.output) == tmp_path / "runs/tiny-llama"
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["data"]["train"] == "*.jsonl"
    Path(first.output).mkdir(parents=True)
    assert Path(written(tmp_path, tiny_llama, "*.jsonl", name="b.yaml").output) == tmp_path / "runs/tiny-llama-2"


def test_nothing_is_overwritten(tiny_llama: Path, tmp_path: Path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(LoraError, match="this file exists") as error:
        written(tmp_path, tiny_llama, prompts(tmp_path))
    assert error.value.exit_code == 2
    assert "fix: name another with --output" in str(error.value)
    assert (tmp_path / "r.yaml").read_text() == "mine"


def test_no_folder_to_write_to(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(LoraError, match="no such folder"):
        written(tmp_path / "gone", tiny_llama, prompts(tmp_path))


BAD = {
    "no model": ("./gone", None, "no such model folder"),
    "no data": (None, "gone.jsonl", "no such data file"),
    "no match": (None, "*.gone", "no file matches this pattern"),
    "kind": (None, ("rows.xyz", "x"), "unknown kind of data file"),
    "broken": (None, ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": '), "broken JSON"),
    "empty": (None, ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}'), "row 2"),
    "no turn": (None, ("rows.jsonl", '{"messages": [{"role": "user"}]}'), "row 1: turn 1 of messages has no content"),
    "none left": (
        None,
        ("rows.jsonl", '{"prompt": "a", "completion": "b", "train": false}'),
        "no row is left to train on",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_as_elsewhere_and_nothing_is_written(
    case: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, data, message = BAD[case]
    if isinstance(data, tuple):
        (tmp_path / data[0]).write_text(data[1])
        data = data[0]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoraError, match=message) as error:
        written(tmp_path, model or tiny_llama, data or prompts(tmp_path.parent))
    assert "fix: " in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_cannot_be_trained(tiny_llama: Path, tmp_path: Path):
    data = prompts(tmp_path)
    config = json.loads((tiny_llama / "config.json").read_text())

    def refused(name: str, message: str, **changed: Any) -> None:
        folder = tmp_path / name
        shutil.copytree(tiny_llama, folder)
        (folder / "config.json").write_text(json.dumps(config | changed))
        if name == "mute":
            for file in folder.glob("token*"):
                file.unlink()
        with pytest.raises(LoraError, match=message):
            written(tmp_path, folder, data)

    refused("bert", "is not a causal language model", model_type="t5", architectures=["T5Model"])
    refused("unknown", "is not known to the installed transformers", model_type="wurzel")
    refused("mute", "the tokenizer cannot be loaded")
    refused("gptq", r"already quantized \(gptq\)", quantization_config={"quant_method": "gptq"})


@pytest.mark.parametrize(("stored", "kind"), [("load_in_4bit", "nf4"), ("load_in_8bit", "int8")])
def test_a_quantized_checkpoint_stays_as_it_is(stored: str, kind: str, tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", stored: True}
    (folder / "config.json").write_text(json.dumps(config))
    assert written(tmp_path, folder, prompts(tmp_path)).quantization == kind


def test_architectures_that_do_not_pack(tmp_path: Path):
    config = hf.FalconConfig(
        **IDS, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, new_decoder_architecture=False, alibi=False
    )
    recipe = written(tmp_path, save_tiny(config, tmp_path / "falcon"), prompts(tmp_path))
    assert not recipe.data.packing
    assert train(load_recipe(tmp_path / "r.yaml", ["train.max_steps=2"]), quiet_console())["learned"]


def test_weights_stay_on_the_hub(hub: FakeHub, tmp_path: Path):  # noqa: F811
    recipe = written(tmp_path, "owner/name", prompts(tmp_path))
    assert recipe.base_model == "owner/name"
    assert "tokenizer.json" in hub.sent
    assert "model.safetensors" not in hub.sent
    find_base("owner/name")  # the weights come when they are needed
    assert "model.safetensors" in hub.sent
    hub.stop()
    assert written(tmp_path, "owner/name", tmp_path / "sums.jsonl", name="b.yaml") == recipe


def test_a_hub_model_without_weights_or_access(hub: FakeHub, tmp_path: Path):  # noqa: F811
    del hub.files["model.safetensors"]
    with pytest.raises(LoraError, match="holds no safetensors weights"):
        written(tmp_path, "owner/name", prompts(tmp_path))
    hub.refuse["/"] = (403, "GatedRepo")
    with pytest.raises(LoraError, match="owner/nmae is gated"):
        written(tmp_path, "owner/nmae", prompts(tmp_path))


# ── large data ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_large_data_a_sample_is_tokenized(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = prompts(tmp_path, 3000)
    whole = written(tmp_path, tiny_llama, data, name="whole.yaml")
    exact = (tmp_path / "whole.yaml").read_text()
    monkeypatch.setattr(survey, "WHOLE_BYTES", 50_000)
    monkeypatch.setattr(survey, "SAMPLE_ROWS", 300)
    recipe = written(tmp_path, tiny_llama, data)
    text = (tmp_path / "r.yaml").read_text()
    assert "# 3,000 rows of prompt and completion: about " in text
    assert "Lengths are those of 300 rows" in text
    prepare(recipe, load_tokenizer(find_base(str(tiny_llama))))
    assert (recipe.data.max_seq_len, recipe.train.epochs) == (whole.data.max_seq_len, whole.train.epochs)
    for about in (r"rows of prompt and completion: (?:about )?([\d,]+) tokens", r"passe?s?, (?:about )?([\d,]+) steps"):
        assert number(about, text) == pytest.approx(number(about, exact), rel=0.1)
    monkeypatch.setattr(survey, "READ_BYTES", 60_000)
    written(tmp_path, tiny_llama, data, name="c.yaml")
    assert number(r"# about ([\d,]+) rows of prompt", (tmp_path / "c.yaml").read_text()) == pytest.approx(3000, rel=0.1)


def test_the_sample_is_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(survey, "WHOLE_BYTES", 20_000)
    monkeypatch.setattr(survey, "SAMPLE_ROWS", 100)
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {at}"} for at in range(1000)])
    source, _ = look_at_rows(str(tmp_path))
    sample, rows, counted = survey._sample_of(source)
    assert sample is not None
    assert (rows, counted, len(sample.kept)) == (2000, True, 100)
    places = [(row.file, row.number) for row in sample.kept]
    assert places == sorted(places)
    assert len(set(places)) == 100
    assert 30 < sum(file.endswith("a.jsonl") for file, _ in places) < 70
    assert np.mean([place for _, place in places]) == pytest.approx(500, abs=100)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = IDS | {"num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 1024}
GROUPED = WIDE | {"num_key_value_heads": 2}
GPT = IDS | {"n_positions": 1024, "n_embd": 128, "n_head": 4}
CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: hf.LlamaConfig(**GROUPED, num_hidden_layers=n),
    "qwen3": lambda n: hf.Qwen3Config(**GROUPED, num_hidden_layers=n, head_dim=32),
    "gemma2": lambda n: hf.Gemma2Config(**GROUPED, num_hidden_layers=n, head_dim=32),
    "gemma3": lambda n: hf.Gemma3TextConfig(**GROUPED, num_hidden_layers=n, head_dim=32),
    "phi": lambda n: hf.PhiConfig(**WIDE, num_hidden_layers=n),
    "phi3": lambda n: hf.Phi3Config(**GROUPED, num_hidden_layers=n),
    "gpt2": lambda n: hf.GPT2Config(**GPT, n_layer=n),
    "gpt-neox": lambda n: hf.GPTNeoXConfig(**WIDE, num_hidden_layers=n),
    "opt": lambda n: hf.OPTConfig(**WIDE, num_hidden_layers=n, ffn_dim=384),
    "mixtral": lambda n: hf.MixtralConfig(**GROUPED, num_hidden_layers=n, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_torch_keeps(name: str):
    """Measured on this CPU, as bytes that autograd saves for one more block; the tokens are beyond short examples'."""
    tokens = 640

    def adapted(layers: int, device: str) -> tuple[Any, dict[str, int]]:
        config = CONFIGS[name](layers)
        for key in [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]:
            setattr(config, key, 0.0)
        with torch.device(device):
            model = hf.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention_implementation(config)
            )
        return model, {target.name: 1 for target in find_targets(model, "all-linear", rank=1, alpha=1)}

    def kept(layers: int) -> int:
        model, ranks = adapted(layers, "cpu")
        attach(model, find_targets(model, list(ranks), rank=1, alpha=1))
        save_only_inputs(model)
        model.train()
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        saved: dict[int, int] = {}
        alive = []  # or another tensor could take the place of one that is gone

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        example = Example(np.arange(tokens) % 500, [(tokens - 1, tokens, 1.0)])
        batch = collate([example], packed=True, pad_id=0, device=CPU)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            summed_loss(model, batch)
        return sum(saved.values())

    measured = kept(3) - kept(2)
    model, ranks = adapted(3, "meta")
    shape = shape_of(without_weights(model), ranks)
    scores = tokens if attention_implementation(model.config) == "eager" else 0
    memory = {"quantization": "none", "target_tokens": 0, "gradient_checkpointing": "none", "scores": scores}
    assert estimate_memory(shape, tokens=tokens, **memory).activations / 3 == pytest.approx(measured, rel=0.02)


def without_weights(skeleton: Any) -> BaseModel:
    tokenizer: Any = None
    return BaseModel(BaseSource("a model", Path()), tokenizer, skeleton.config, skeleton, None, False)


def test_blocks_of_several_kinds_are_measured_each_and_of_any_size():
    """Dense blocks first and experts after them; and a model that no test could hold, at no memory."""
    wide: dict[str, Any] = WIDE
    kinds = hf.DeepseekV3Config(
        **wide, num_hidden_layers=5, first_k_dense_replace=2, moe_intermediate_size=96, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=32,
    )  # fmt: skip
    large = hf.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    measured = []
    for config in (kinds, large):
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
        names = [target.name for target in find_targets(model, "all-linear", rank=1, alpha=1)]
        measured.append(measure_blocks(without_weights(model), names, torch.bfloat16))
    dense, experts = measured[0][:2], measured[0][2:]
    assert len(set(dense)) == len(set(experts)) == 1
    assert dense[0] != experts[0]
    assert len(measured[1]) == 80
    # Inputs of two norms; outputs of q, k, v, attention, gate and up. Inputs of q, k, v, gate, up, down are made again.
    hidden, inner = 8192, 28672
    assert measured[1][40].token_bytes == pytest.approx(2 * (6 * hidden + 2 * inner), rel=0.01)


def test_a_block_of_8b_keeps_what_the_docs_say():
    """docs/speed.md: bytes of a token in bf16, without `rank` values a layer. A GPU adds logarithms of attention."""
    config = hf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    names = [target.name for target in find_targets(model, "all-linear", rank=1, alpha=1)]
    *_, last = measure_blocks(without_weights(model), names, torch.bfloat16)
    assert last.token_bytes - 7 * 2 == 94_208


@pytest.mark.parametrize(
    ("quantization", "double"), [("none", True), ("nf4", True), ("nf4", False), ("int8", True), ("int4", True)]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_what_the_loaded_model_holds(name: str, quantization: str, double: bool, tmp_path: Path):
    folder = save_tiny(CONFIGS[name](2), tmp_path / name)
    model = load_model(
        find_base(str(folder)), quantization=quantization, dtype=torch.bfloat16, device=CPU, double_quantization=double
    )
    shape = shape_of(look_at_model(str(folder)), {}, quantization=quantization, device="cpu")
    memory = estimate_memory(
        shape, quantization=quantization, double_quantization=double, tokens=0, target_tokens=0,
        gradient_checkpointing="none",
    )  # fmt: skip
    computing = shape.largest_layer * 2 if quantization != "none" else 0
    assert memory.weights - computing == pytest.approx(held_bytes(model), rel=0.02)


SHAPE = ModelShape(
    quantizable=10**9, other=10**8, largest_layer=10**7, adapter=10**7, vocabulary=32_000, hidden=2048,
    blocks=(Block(56_384, 128),) * 20,
)  # fmt: skip


@given(
    shape=st.fixed_dictionaries(
        {name: st.integers(1, 10**10) for name in ("quantizable", "other", "largest_layer", "adapter", "vocabulary")}
        | {"hidden": st.integers(1, 10**5)}
    ),
    blocks=st.lists(st.builds(Block, st.integers(10**3, 10**6), st.integers(1, 10**6)), min_size=1, max_size=5),
    numbers=st.fixed_dictionaries(
        {"tokens": st.integers(1, 10**6), "target_tokens": st.integers(1, 10**6), "scores": st.integers(0, 10**5)}
        | {"optimizer_bytes": st.integers(0, 8)}
    ),
    quantization=st.sampled_from(["nf4", "int8", "int4", "none"]),
    value_bytes=st.sampled_from([2, 4]),
    checkpointing=st.sampled_from(["none", "full", "offload"]),
    more=st.sampled_from([
        "quantizable", "other", "largest_layer", "adapter", "vocabulary", "blocks", "tokens", "target_tokens",
        "scores", "optimizer_bytes",
    ]),
)  # fmt: skip
def test_the_estimate_grows_with_all_that_there_is(
    shape: dict[str, int], blocks: list[Block], numbers: dict[str, int], quantization: str, value_bytes: int,
    checkpointing: str, more: str,
):  # fmt: skip
    def total(shape: dict[str, int], blocks: list[Block], numbers: dict[str, int], **changed: Any) -> int:
        settings: dict[str, Any] = {"quantization": quantization, "value_bytes": value_bytes}
        settings |= {"gradient_checkpointing": checkpointing, **numbers, **changed}
        return estimate_memory(ModelShape(**shape, blocks=tuple(blocks)), **settings).total

    base = total(shape, blocks, numbers)
    if more == "blocks":
        grown = total(shape, [*blocks, Block(1, 1)], numbers)
        assert grown > base or (checkpointing == "offload" and grown == base)  # inputs of two blocks, however many
    elif more in shape:
        assert total(shape | {more: 2 * shape[more]}, blocks, numbers) >= base
    else:
        grown = total(shape, blocks, numbers | {more: 2 * numbers[more] + 1})
        assert grown > base or (more == "target_tokens" and grown == base)  # one chunk of logits is the most there is
    by_mode = [total(shape, blocks, numbers, gradient_checkpointing=mode) for mode in ("offload", "full", "none")]
    assert by_mode == sorted(by_mode)
    by_quantization = [total(shape, blocks, numbers, quantization=kind) for kind in ("nf4", "int8")]
    assert by_quantization == sorted(by_quantization)
    assert total(shape, blocks, numbers, double_quantization=False) >= base


def test_the_estimate_by_hand():
    """Against the formula of the docstring, written out in numbers."""
    memory = estimate_memory(SHAPE, quantization="nf4", tokens=1000, target_tokens=400)
    assert memory.weights == round(1e9 * (4 + 1 / 8 + 1 / 512) / 8) + 2 * 10**8 + 2 * 10**7
    assert memory.adapter == 10**7 * 18
    assert memory.activations == 1000 * 20 * 56_384
    assert memory.logits == 400 * 32_000 * (2 + 4)
    assert memory.overhead == GIB
    assert memory.total == memory.weights + memory.adapter + memory.activations + memory.logits + GIB
    again = estimate_memory(SHAPE, quantization="none", tokens=1000, target_tokens=400, gradient_checkpointing="full")
    assert again.activations == 1000 * (20 * 2048 * 2 + 56_384)
    assert again.weights == 2 * (10**9 + 10**8)
    longer = estimate_memory(SHAPE, quantization="nf4", tokens=1000, target_tokens=0, gradient_checkpointing="offload")
    assert longer.activations == 1000 * (2 * 2048 * 2 + 56_384)  # of any number of blocks
    assert offloaded_bytes(SHAPE, 1000) == 20 * 2**22  # each of 4,096,000 bytes, in torch's pinned blocks of 4 MiB
    for tokens in (1000, 1024, 1025):  # as training counts once it has measured a block
        measured = ActivationPlan((True,) * 20, (56_384.0,) * 20, 2048 * 2, offloaded=True)
        assert offloaded_bytes(SHAPE, tokens) == measured.host_bytes(tokens, pinned=True)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 7B, but for its weights, which nobody reads here."""
    folder = tmp_path_factory.mktemp("models") / "seven-billion"
    config = hf.LlamaConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(each.shape) for name, each in hf.LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole: it takes no place on the disk
    return folder


@pytest.fixture(scope="module")
def base_of_seven_billion(seven_billion: Path) -> BaseModel:
    base = look_at_model(str(seven_billion))
    assert base.packs
    return base


def rows_of(lengths: list[int], name: str = "completion") -> DataSurvey:
    array = np.array(lengths, np.int64)
    return DataSurvey(
        source=survey.FileSource("rows.jsonl", ()), reading=Reading(name, ""), rows=len(lengths), counted=True,
        sample=None, lengths=array, targets=array // 2, stride=1, target_share=0.5, distinct=len(lengths),
        percentiles={},
    )  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 4096), min_size=1, max_size=100),
    sizes=st.tuples(st.integers(5, 100), st.integers(5, 100)),
    text=st.booleans(),
)
def test_a_smaller_gpu_never_gets_more(
    base_of_seven_billion: BaseModel, lengths: list[int], sizes: tuple[int, int], text: bool
):
    base, data = base_of_seven_billion, rows_of(lengths, "text" if text else "completion")
    adapter = choose_adapter(base, data.target_tokens)
    shape = shape_of(base, dict.fromkeys(adapter.layers, adapter.rank))

    def fit(size: int) -> choices.Fit | None:
        try:
            return choose_sizes(base, data, Device("a GPU", size * GIB), shape, 1)
        except LoraError:
            return None

    small, large = fit(min(sizes)), fit(max(sizes))
    if small is None:
        return
    assert large is not None
    assert small.row.tokens <= large.row.tokens
    if small.quantization == large.quantization:
        assert small.micro_batch_size <= large.micro_batch_size
        modes = ["none", "full", "offload"]
        assert modes.index(small.gradient_checkpointing) >= modes.index(large.gradient_checkpointing)
    assert not (small.quantization == "none" and large.quantization == "nf4")
    for chosen, size in ((small, min(sizes)), (large, max(sizes))):
        assert chosen.memory.total <= 0.85 * size * GIB
        step = chosen.micro_batch_size * chosen.gradient_accumulation_steps * chosen.row.tokens
        assert step <= max(2 * 8192, chosen.row.tokens)


def test_what_a_7b_model_gets(
    base_of_seven_billion: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seven_billion: Path
):
    monkeypatch.setattr(first_recipe, "look_at_model", lambda *_, **__: base_of_seven_billion)  # looked at once
    rows = [{"prompt": a, "completion": b * 60} for a, b in sums(200)]
    data, sizes = write_rows(tmp_path / "long.jsonl", rows), ("8GB", "16GB", "80GB")
    chosen = [written(tmp_path, seven_billion, data, gpu, f"{gpu}.yaml") for gpu in sizes]
    assert [each.quantization for each in chosen] == ["nf4", "nf4", "none"]
    assert [each.train.gradient_checkpointing for each in chosen] == ["selective", "none", "none"]
    assert "in bf16 they would take 12.55 GiB" in (tmp_path / "16GB.yaml").read_text()  # 2 bytes × 6,738,415,616
    assert "without it, a step would need about " in (tmp_path / "8GB.yaml").read_text()


@pytest.mark.parametrize(
    ("kind", "width", "examples", "rate", "said"),
    [
        ("llama", 2000, 128, 5e-4, "^0.781"),  # every factor is 1
        ("llama", 576, 2, 1.7e-4, "^0.781"),
        ("llama", 4096, 32, 1.4e-4, "^0.781"),
        ("qwen3", 4096, 32, 2.4e-4, "^0.0775"),
        ("gemma3_text", 1152, 8, 1.9e-4, "a guess for this model"),
        ("llama", 576, 128, 1e-3, "at most this"),
        ("llama", 8192, 1, 5e-5, "at least this"),
    ],
)
def test_rates_by_width_and_examples_of_a_step(kind: str, width: int, examples: float, rate: float, said: str):
    found, why = choose_learning_rate(kind, width, examples)
    assert found == rate
    assert said in why
    assert ("guess" in why) == (kind == "gemma3_text")


COSTS: dict[str, Any] = {"data_fingerprint": "", "base_fingerprint": "", "dtype": "bfloat16", "held_out": True}
COSTS |= {"examples": 8, "target_tokens": 9}


def costs_of(nf4: float, int8: float, int4: float | None = None) -> Costs:
    found = [
        {"quantization": kind, "loss": 2 + cost, "weights": 1, "cost": cost, "low": cost - 0.02, "high": cost + 0.02}
        for kind, cost in (("none", 0.0), ("nf4", nf4), ("int8", int8), ("int4", int4))
        if cost is not None
    ]
    return Costs.model_validate({**COSTS, "costs": found})


@pytest.mark.parametrize(
    ("size", "costs", "kind"),
    [
        (80, None, "none"),
        (16, None, "nf4"),
        (16, costs_of(0.2, 0.01), "int8"),
        (16, costs_of(0.2, 0.15), "nf4"),  # hardly better
        (16, costs_of(0.02, 0.0), "nf4"),  # not worth the memory
        (8, costs_of(0.2, 0.01), "nf4"),  # it does not fit
        (8, costs_of(0.2, 0.01, 0.05), "int4"),  # five bits do
        (8, costs_of(0.2, 0.01, 0.15), "nf4"),
        (16, costs_of(0.2, 0.01, 0.005), "int8"),
        (80, costs_of(0.2, 0.01), "none"),
    ],
)
def test_the_base_is_quantized_as_little_as_fits(
    size: int, costs: Costs | None, kind: str, base_of_seven_billion: BaseModel
):
    base, data = base_of_seven_billion, rows_of([500] * 2000)
    adapter = choose_adapter(base, data.target_tokens)
    shape = shape_of(base, dict.fromkeys(adapter.layers, adapter.rank))
    assert choose_sizes(base, data, Device("a GPU", size * GIB), shape, 1, costs).quantization == kind


def test_a_model_of_a_billion_parameters_stays_in_16_bits_on_a_small_card(tmp_path: Path):
    """Llama 3.2 1B on 8 GB, in one long row at a time: NF4 would save memory that nothing else needs."""
    config = hf.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("meta"):
        base = without_weights(hf.LlamaForCausalLM(config))
    data = rows_of([900] * 2000)
    adapter = choose_adapter(base, data.target_tokens)
    shape = shape_of(base, dict.fromkeys(adapter.layers, adapter.rank))
    fit = choose_sizes(base, data, Device("a GPU", 8 * GIB), shape, 1)
    assert fit.quantization == "none"
    assert fit.memory.total <= 0.6 * 8 * GIB
    assert choose_sizes(base, data, Device("a GPU", 4 * GIB), shape, 1).quantization == "nf4"


def test_what_was_measured_of_this_model_is_the_reason(tiny_llama: Path, tmp_path: Path, lora: Any):
    def reasons(name: str) -> str:
        written(tmp_path, tiny_llama, tmp_path / "sums.jsonl", name=name)
        return " ".join((tmp_path / name).read_text().replace("#", "").split())

    prompts(tmp_path)
    assert "nf4 cost a model of 135 million parameters" in reasons("first.yaml")
    said = lora("check", tmp_path / "first.yaml", "--compare-quantization", "--set", "quantization=nf4", "--json")
    cost = {each["quantization"]: each["cost"] for each in json.loads(said.out)["quantization"]["costs"]}
    assert f"Measured on this model: nf4 {cost['nf4']:+.2f} nats a token" in reasons("second.yaml")


def test_a_model_that_does_not_fit(
    base_of_seven_billion: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seven_billion: Path
):
    monkeypatch.setattr(first_recipe, "look_at_model", lambda *_, **__: base_of_seven_billion)
    with pytest.raises(LoraError, match=r"\(6.7 billion parameters\) does not fit into a GPU of 4 GiB") as error:
        written(tmp_path, seven_billion, prompts(tmp_path), "4GB")
    text = str(error.value)
    assert not (tmp_path / "r.yaml").exists()
    assert number(r"it needs about ([\d.]+) GiB", text) > 3.4
    size = number(r"use a GPU of (\d+) GB or more", text)
    assert number(r"a model of at most about ([\d.]+) billion", text) < 6.7
    assert written(tmp_path, seven_billion, tmp_path / "sums.jsonl", f"{size:g}GB").quantization == "nf4"


def test_without_a_gpu_it_is_for_the_cpu_and_says_so(tiny_llama: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(first_recipe, "pick_device", lambda _: torch.device("cpu"))  # wherever this runs
    written(tmp_path, tiny_llama, prompts(tmp_path), None)
    text = (tmp_path / "r.yaml").read_text()
    assert "by `lora init`, for the CPU here" in text
    assert "No GPU was found here" in text


SIZES = st.decimals(min_value="0.1", max_value=900, places=1)


@given(SIZES, st.sampled_from(["", " "]), st.sampled_from(["", "g", "G", "gb", "GB", "Gb", "GiB", "gib"]))
def test_sizes_as_people_write_them(value: Any, space: str, unit: str):
    assert parse_size(f"{value}{space}{unit}") == round(float(value) * 2**30)


@given(st.integers(1, 900_000), st.sampled_from(["m", "MB", "MiB"]))
def test_sizes_in_mebibytes(value: int, unit: str):
    assert parse_size(f"{value}{unit}") == value * 2**20


@given(st.text())
def test_nonsense_is_no_size(text: str):
    try:
        size = parse_size(text)
    except LoraError:
        return
    assert 0 < size <= 2**40
    assert re.fullmatch(r"\s*[\d.]+\s*[A-Za-z]*\s*", text)


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "-8", "12 apples", "12GBs", "1e3", "nan", "8,5", "99999", "²"])
def test_these_are_no_sizes(text: str):
    with pytest.raises(LoraError, match="is not an amount of memory") as error:
        parse_size(text)
    assert "fix: write what the GPU has, such as 12GB" in str(error.value)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_says_what_comes_next(tiny_gpt2: Path, tmp_path: Path, lora: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    data = prompts(tmp_path)
    done = lora("init", tiny_gpt2, data, "--gpu", "12GB")
    assert done.code == 0, done.text
    assert "recipe.yaml is written, for a GPU of 12 GiB" in done.out
    assert "lora check recipe.yaml" in done.out
    assert "lora train recipe.yaml" in done.out
    checked = lora("check", "recipe.yaml")
    assert checked.code == 0, checked.text


def test_json_is_one_document(tiny_gpt2: Path, tmp_path: Path, lora: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    done = lora("init", tiny_gpt2, prompts(tmp_path), "--gpu", "12", "--output", "a.yaml", "--json")
    told = json.loads(done.out)
    assert told["recipe"] == "a.yaml"
    assert told["memory"]["available"] == 12 * 2**30
    assert told["memory"]["total"] == sum(
        told["memory"][part] for part in ("weights", "adapter", "activations", "logits", "overhead")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "model"], "which model, and which data?"),
        (["init", "model", "data", "--schema"], "--schema is used without a model"),
        (["init", "model", "data", "--gpu", "huge"], "--gpu huge is not an amount of memory"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, tmp_path: Path, lora: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    done = lora(*arguments)
    assert done.code == 2
    assert message in done.text
    assert "fix: " in done.text
    assert not list(tmp_path.iterdir())
