"""How a command ends when something goes wrong: in words, in JSON, with the right exit code, never with a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, write_rows

from lora_cli import boundary
from lora_cli.cli import app
from lora_cli.errors import CheckFailed, LoraError, RecipeErrors, command, reading


class PanicException(BaseException):
    """Of the name and kind that pyo3 gives a panic in Rust code."""


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def endless() -> None:
    endless()


def too_deep() -> BaseException:
    try:
        endless()
    except RecursionError as error:
        return error
    raise AssertionError


def foreign() -> list[BaseException]:
    """What damaged files have made libraries raise."""
    return [
        PanicException("called `Option::unwrap()` on a `None` value"),
        too_deep(),
        MemoryError(),
        OverflowError("date value out of range"),
        UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
        KeyError("vocab_size"),
        IndexError("list index out of range"),
        TypeError("unhashable type: 'dict'"),
        ZeroDivisionError("division by zero"),
        AssertionError(),
        StopIteration(),
        ImportError("needs kernels"),
        OSError(errno.EIO, "Input/output error"),
        Wordless(),
    ]


def name_of(error: object) -> str | None:
    return type(error).__name__ if isinstance(error, BaseException) else None


@pytest.mark.parametrize("error", foreign(), ids=name_of)
def test_whatever_a_library_raises_for_a_foreign_file_is_a_mistake_in_words(error):
    with (
        pytest.raises(LoraError) as caught,
        reading("the tokenizer cannot be read", Path("a/tokenizer.json"), "copy it again"),
    ):
        raise error
    shown = caught.value.render()
    assert shown.startswith("error: a/tokenizer.json: the tokenizer cannot be read: ")
    assert len(shown.splitlines()) == 2
    assert shown.endswith("  fix: copy it again")
    assert caught.value.exit_code == 2
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), CheckFailed("no")], ids=name_of)
def test_what_is_no_fault_of_a_file_passes_as_it_is(end):
    with pytest.raises(type(end)) as caught, reading("it cannot be read"):
        raise end
    assert caught.value is end


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(boundary, "_output", None)
    monkeypatch.chdir(tmp_path)
    return place


def raising(error: BaseException):
    def app(_arguments, standalone_mode):
        raise error

    return app


@pytest.mark.parametrize("error", foreign(), ids=name_of)
def test_the_last_resort_writes_the_traceback_to_a_file_and_a_line_to_the_screen(error, temporary, capsys):
    assert boundary.run(raising(error), ["train", "--json"]) == 1
    out, err = capsys.readouterr()
    (kept,) = temporary.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert type(error).__name__ in kept.read_text()
    assert str(kept.relative_to(Path.cwd())) in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    document = json.loads(out)["error"]
    assert document["exit_code"] == 1
    assert document["fix"]


def test_a_traceback_that_cannot_be_made_or_written_hides_nothing(temporary, capsys, monkeypatch):
    monkeypatch.setattr(boundary.traceback, "format_exception", lambda *_: endless())
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: endless())
    error = too_deep()
    assert boundary.run(raising(error), ["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: a bug in lora: RecursionError")
    assert f"{__file__}:" in err  # the places, at least


def test_a_traceback_lies_in_the_run_folder_once_there_is_a_run(temporary, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    boundary.keep_tracebacks_in(run)
    assert boundary.run(raising(KeyError("x")), ["train"]) == 1
    assert not any(run.iterdir())  # a folder that is no run yet stays free for one
    (run / "recipe.yaml").write_text("")
    assert boundary.run(raising(KeyError("x")), ["train"]) == 1
    assert [path.name for path in run.glob("lora-traceback-*")]
    assert len(list(temporary.iterdir())) == 1


def test_ctrl_c_and_a_reader_that_left_are_no_faults(temporary, capfd):
    assert boundary.run(raising(KeyboardInterrupt()), ["runs", "--json"]) == 130
    out, err = capfd.readouterr()
    assert err == "stopped\n"
    assert json.loads(out)["error"]["exit_code"] == 130
    with pytest.raises(SystemExit):
        boundary.run(raising(SystemExit(4)), ["runs"])
    assert not any(temporary.iterdir())


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["trian"], "no such command 'trian'", "did you mean 'train'?; see lora --help"),
        (["train"], "missing argument 'recipe'", "see lora train --help"),
        (["merge", "x"], "missing option '--output'", "see lora merge --help"),
        (["train", "x", "--jsn"], "no such option: --jsn", "--json"),
        (["train", "x", "y"], "got unexpected extra argument", "see lora train --help"),
        (["generate", "--top-p", "2"], "invalid value for '--top-p'", "see lora generate --help"),
        (["eval", "x", "--dtype", "fp64"], "invalid value for '--dtype'", "see lora eval --help"),
        (["train", "nope.yaml"], "no such recipe", "check the path"),
        (["runs", "nope"], "no such folder", "lora runs"),
        (["eval", "nope"], "", ""),
        (["merge", "nope", "--output", "m"], "no such folder", "name a run folder"),
        (["generate", "./nope", "hi"], "no such folder", "check the path"),
        (["init", "./nope", "nope.jsonl"], "", ""),
        (["check", "nope.yaml"], "no such recipe", "check the path"),
    ],
)
def test_every_error_is_one_json_document_too(arguments, what, fix, temporary, capsys):
    assert boundary.run(app, [*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert list(document) == ["error"]
    assert list(document["error"]) == ["what", "where", "fix", "details", "exit_code"]
    assert document["error"]["what"].startswith(what)
    assert fix in document["error"]["fix"]
    assert document["error"]["exit_code"] == 2
    assert err.startswith("error: ")
    assert "  fix: " in err
    assert boundary.run(app, arguments) == 2
    assert capsys.readouterr().out == ""


def test_every_problem_of_a_recipe_is_in_the_document(temporary, capsys):
    (temporary / "r.yaml").write_text("base_modl: x\nadaptr: {}\n")
    assert boundary.run(app, ["train", str(temporary / "r.yaml"), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["details"]
    assert any("base_modl" in problem for problem in problems)
    assert any("adaptr" in problem for problem in problems)
    assert issubclass(RecipeErrors, LoraError)


def test_a_check_that_says_no_prints_its_result_and_the_error_in_one_document(recipe_file, sums, temporary, capsys):
    sums.write_text(sums.read_text() + json.dumps({"prompt": "p", "completion": ""}) + "\n")
    assert boundary.run(app, ["check", str(recipe_file()), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert document["examples"]
    assert document["error"]["exit_code"] == 3
    assert "no target token" in json.dumps(document["error"])


def test_a_training_that_learned_nothing_prints_its_report_and_the_error(recipe_file, temporary, capsys):
    recipe = recipe_file(train={"max_steps": 1, "learning_rate": 1e-60})
    assert boundary.run(app, ["train", str(recipe), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "nothing learned"
    assert document["error"]["exit_code"] == 3


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "two words",
        "x; touch pwned",
        "$(touch pwned)",
        "it's",
        'a"b',
        "-n",
        "a\nb",
        "\x1b[31m",
        "é",
        "a\\b'\x07",
    ],
)
def test_a_suggested_command_can_be_pasted_into_a_shell(name, tmp_path):
    line = command("printf", "%s", f"./{name}/recipe.yaml")
    assert not any(ord(character) < 32 for character in line)
    done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout == f"./{name}/recipe.yaml".encode()
    assert os.listdir(tmp_path) == []


def edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def set_tokenizer(folder: Path, **parts: object) -> None:
    edit(folder, "tokenizer.json", **parts)


CATASTROPHIC = {"type": "Split", "pattern": {"Regex": r"(a|a)*$|(\w+\s?)+!"}, "behavior": "Isolated", "invert": False}
UNKNOWN_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
DAMAGE = {
    "a regex that searches for ever": lambda at: set_tokenizer(at, pre_tokenizer=CATASTROPHIC),
    "a token that is not there": lambda at: set_tokenizer(at, post_processor=UNKNOWN_TOKEN),
    "tokenizer.json is a list": lambda at: (at / "tokenizer.json").write_text("[]"),
    "tokenizer.json is deep": lambda at: (at / "tokenizer.json").write_text("[" * 100_000),
    "an unknown activation": lambda at: edit(at, "config.json", activation_function="nope"),
    "heads that do not divide": lambda at: edit(at, "config.json", n_head=5),
    "negative width": lambda at: edit(at, "config.json", n_embd=-64),
    "no width": lambda at: edit(at, "config.json", n_embd=0),
    "no heads": lambda at: edit(at, "config.json", n_head=0),
    "negative positions": lambda at: edit(at, "config.json", n_positions=-5),
    "dtype is a mapping": lambda at: edit(at, "config.json", dtype={}),
    "a width in words": lambda at: edit(at, "config.json", n_embd="wide"),
    "another kind of model": lambda at: edit(at, "config.json", model_type="vit", architectures=[1]),
    "architectures is a number": lambda at: edit(at, "config.json", model_type="vit", architectures=7),
    "quantization is a list": lambda at: edit(at, "config.json", quantization_config=["nf4"]),
    "quantization without a method": lambda at: edit(at, "config.json", quantization_config={}),
    "model_type is a list": lambda at: edit(at, "config.json", model_type=["gpt2"]),
    "config.json is deep": lambda at: (at / "config.json").write_text("[" * 100_000),
    "end token is a mapping": lambda at: edit(at, "tokenizer_config.json", eos_token={"content": {"a": 1}}),
    "template is a number": lambda at: edit(at, "tokenizer_config.json", chat_template=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command_line", ["check", "init"])
def test_a_damaged_model_folder_is_refused_in_words(damage, command_line, recipe_file, tmp_path, temporary, capsys):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "data" / "tiny-gpt2", model)
    DAMAGE[damage](model)
    rows = [{"prompt": "a" * 60, "completion": "aaaa aaaa bbbb " * 4 + str(at)} for at in range(200)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = recipe_file(base_model=str(model), data={"train": str(data), "max_seq_len": 128})
    arguments = ["check", str(recipe)]
    if command_line == "init":
        arguments = ["init", str(model), str(data), "--output", str(tmp_path / "new.yaml"), "--gpu", "12GB"]
    assert boundary.run(app, arguments) in (0, 2)  # 0 where what is damaged is not used
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "a bug in lora" not in err
    assert not list(temporary.glob("lora-traceback-*"))
