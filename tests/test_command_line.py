"""Help, its examples, completion, and what is said to people who come from other programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT
from typer.main import get_command

from lora_cli import boundary
from lora_cli.cli import app, hints

GROUP: Any = get_command(app)
PARAMETERS = {
    name: {option for each in command.params for option in each.opts} for name, command in GROUP.commands.items()
}
AS_LORA = "import sys; sys.argv[0] = 'lora'; from lora_cli.cli import main; main()"


def lora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_LORA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"} | environment,
    )


def test_every_command_has_examples_that_parse():
    assert set(hints.EXAMPLES) == set(GROUP.commands)
    for name, examples in hints.EXAMPLES.items():
        for line in examples:
            program, command, *arguments = shlex.split(line)
            assert (program, command) == ("lora", name)
            GROUP.commands[name].make_context(name, arguments)  # raises for what does not parse


@pytest.mark.parametrize("name", ["", *GROUP.commands])
def test_h_and_lora_help_are_help(name):
    shown = lora(*name.split(), "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: lora")
    assert lora(*name.split(), "-h").stdout == lora("help", *name.split()).stdout == shown.stdout
    for line in hints.EXAMPLES.get(name, ()):
        assert f"    {line}\n" in shown.stdout


def test_help_of_what_does_not_exist_is_an_error_in_words():
    done = lora("help", "trian")
    assert done.returncode == 2
    assert "no such command 'trian'" in done.stderr


@pytest.mark.parametrize("text", [*hints._COMMANDS.values(), *hints._OPTIONS.values()])
def test_what_hints_name_exists(text):
    for command, rest in re.findall(r"\blora (\w[\w-]*)([^;,]*)", text):
        assert command in PARAMETERS
        assert set(re.findall(r"--[\w-]+", rest)) <= PARAMETERS[command]
    if text.startswith("--"):
        assert any(text in options for options in PARAMETERS.values())


def test_no_hint_is_for_what_exists():
    assert not set(hints._COMMANDS) & set(GROUP.commands)
    assert not any(name in options for name in hints._OPTIONS for options in PARAMETERS.values())


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["plan"], "use lora check RECIPE; see lora --help"),
        (["finetune", "x"], "use lora train RECIPE; lora init MODEL DATA writes one"),
        (["gguf"], "use lora export RUN --to gguf --output FILE"),
        (["serve"], "there is no server here"),
        (["upload"], "use lora push RUN --to OWNER/NAME"),
        (["push", "x"], "for example lora push runs/my-run"),
        (["dpo"], "not offered"),
        (["trian"], "did you mean 'train'?"),
        (["train", "--config", "x"], "name the recipe without an option: lora train recipe.yaml"),
        (
            ["check", "x", "--model_name_or_path", "y"],
            "in this program: base_model (in the recipe, or here with --set)",
        ),
        (
            ["train", "x", "--learning-rate=3"],
            "write train.learning_rate in the recipe, or --set train.learning_rate=…",
        ),
        (["train", "x", "--use_dora"], "DoRA is not offered"),
        (["generate", "x", "--max-tokens", "3"], "did you mean --max-new-tokens?"),
        (["merge", "x", "-o", "y"], "did you mean --output?"),
        (["merge", "x"], "for example lora merge runs/my-run --output merged"),
        (["train"], "for example lora train recipe.yaml"),
    ],
)
def test_what_other_programs_call_it_is_answered(arguments, fix, capsys):
    assert boundary.run(app, arguments, hints.hint) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"\n  fix: {fix}" in said.err or (fix in said.err and "remove it" in said.err)


def test_completion_is_offered_and_only_on_request(tmp_path):
    home = {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    words = lora(_LORA_COMPLETE="complete_bash", COMP_WORDS="lora ch", COMP_CWORD="1", **home)
    assert words.stdout.split() == ["check", "chat"]
    words = lora(_LORA_COMPLETE="complete_bash", COMP_WORDS="lora train --res", COMP_CWORD="2", **home)
    assert words.stdout.split() == ["--resume"]
    assert not any(tmp_path.iterdir())
    lora("--install-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", **home)
    asked = lora("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", **home)
    assert asked.returncode == 0, asked.stderr
    (script,) = (path for path in tmp_path.rglob("*") if path.is_file() and "_LORA_COMPLETE" in path.read_text())
    assert "complete" in script.read_text()


GARBAGE = {  # what a file may hold: every reader has to refuse it in words
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "broken.yaml": b"a: [1, 2\n b: }",
    "list.yaml": b"- 1\n- 2\n",
    "wrong.yaml": b"base_model: 3\nlora_r: 8\ntrain: {lr: x}\n",
    "row.jsonl": b'{"prompt": 1\n',
}
WITH = {
    "init": ["{model}", "{}"],
    "train": ["{}"],
    "check": ["{}"],
    "eval": ["{}", "--data", "{}"],
    "merge": ["{}", "--output", "out"],
    "generate": ["{}", "hi"],
    "chat": ["{}"],
    "runs": ["{}"],
    "inspect": ["{}"],
    "resize": ["{}", "--rank", "2", "--output", "out"],
    "diff": ["{model}", "{}", "--rank", "2", "--output", "out"],
    "convert": ["{}", "--to", "mlx", "--output", "out"],
    "combine": ["{}", "{}:0.5", "--output", "out"],
    "sweep": ["{}", "--vary", "adapter.rank=1,2", "--output", "out"],
    "push": ["{}", "--to", "me/it"],
    "analyze": ["{}", "{}"],
    "selftest": ["--model", "{}"],
    "export": ["{}", "--to", "gguf", "--output", "out.gguf"],
    "calibrate": ["{}", "--output", "out"],
}
USAGE = [
    [],
    ["--nope"],
    ["nope"],
    ["--help-me", "x"],
    *([name, "--nope"] for name in GROUP.commands),
    *([name, "a", "b", "c", "d", "e"] for name in GROUP.commands),
    *([name, "--set"] for name in ("train", "check")),
]


def error_of(arguments: list[str], capsys: Any) -> dict[str, Any]:
    """The error in the one document that --json prints."""
    code = boundary.run(app, [*arguments, "--json"], hints.hint)
    out, err = capsys.readouterr()
    assert code in (1, 2, 3), (arguments, out)
    assert out.count("\n") == 1, (arguments, out)
    document = json.loads(out)
    assert document["error"]["exit_code"] == code, arguments
    assert "a bug in lora" not in err, arguments
    return document["error"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in WITH
        for name in (*GARBAGE, "missing", "folder")
        if (command, name) != ("runs", "folder")  # a folder without runs is a list of none
    ],
)
def test_json_is_one_document_for_broken_input_of_every_command(command, name, tmp_path, capsys, monkeypatch):
    assert set(WITH) == set(GROUP.commands)
    monkeypatch.chdir(tmp_path)
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name in GARBAGE:
        (tmp_path / name).write_bytes(GARBAGE[name])
    model = ROOT / "tests" / "data" / "tiny-gpt2"
    assert error_of([command, *(part.format(f"./{name}", model=model) for part in WITH[command])], capsys)["what"]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_json_is_one_document_for_every_usage_error(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of(arguments, capsys)["what"]
