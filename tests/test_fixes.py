"""What a `fix:` of the package names (commands, options, settings, values) exists; test_reasons.py follows some."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import ROOT
from pydantic import TypeAdapter, ValidationError
from typer.main import get_command

from lora_cli.cli import app
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, SourceRecipe, all_keys, section_of

PLACE = "\N{MIDDLE DOT}"  # where a fix has a value that is known only when it is shown
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {option for each in COMMANDS.values() for parameter in each.params for option in parameter.opts}
SETTINGS = {".".join(key): key for key in all_keys()}
LEAVES = {key[-1] for key in all_keys()} | set(Recipe.model_fields) | set(SourceRecipe.model_fields)
OTHERS = {"--nproc-per-node", "--standalone"}  # torchrun's
VALUES = re.compile(r"\b(?:write|set|choose|use|try|or) ((?:\w+\.)?[a-z_]+): ([\w.-]+)")
NOT_OURS = {"eos_token", "lora_alpha"}  # settings of model files, that a fix may speak of


def text_of(node: ast.expr) -> str:
    """The text of a string, an f-string or a choice between them; what is not known is a dot."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else PLACE for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)}\n{text_of(node.orelse)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.BoolOp):
        return "\n".join(map(text_of, node.values))
    return ""


def fixes() -> Iterator[tuple[str, str]]:
    """(file:line, text): arguments called `fix`, variables of that name, the fixes of Kind and Retired."""
    for path in sorted((ROOT / "lora_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[ast.expr] = []
            if isinstance(node, ast.Call):
                found += [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                if called == "Retired" and len(node.args) == 2:
                    found.append(node.args[1])
                if called == "Kind" and len(node.args) == 3:
                    found.append(node.args[2])
            if isinstance(node, ast.Assign) and any(isinstance(at, ast.Name) and at.id == "fix" for at in node.targets):
                found.append(node.value)
            for value in found:
                for line in filter(None, text_of(value).split("\n")):
                    yield f"{path.relative_to(ROOT)}:{value.lineno}", line


FIXES = list(fixes())


def test_the_fixes_are_found():
    assert len(FIXES) > 200
    assert any("--set output=" in text for _, text in FIXES)
    assert any("data.packing: false" in text for _, text in FIXES)


def unknown(text: str) -> Iterator[str]:
    """What a fix names and there is not."""
    yield from set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - OPTIONS - OTHERS
    yield from set(re.findall(r"(?<![\w./])(?:adapter|data|train)\.[a-z_]+(?![\w/])", text)) - SETTINGS.keys()
    yield from set(re.findall(r"(?:^|[:,;`(] )lora ([a-z]+)", text)) - COMMANDS.keys()
    for name in re.findall(r"(?:write|set|choose|use|remove) (?:quantization: )?([a-z]+_[a-z_]+)\b", text):
        if name not in LEAVES | NOT_OURS and re.search(rf"\b{name}(?::|,|$| or )", text):
            yield name


def test_what_a_fix_names_exists():
    assert [(where, name) for where, text in FIXES for name in unknown(text)] == []


@pytest.mark.parametrize(("where", "text"), [each for each in FIXES if VALUES.search(each[1])])
def test_a_value_that_a_fix_tells_to_write_is_accepted_for_its_setting(where: str, text: str):
    for name, value in VALUES.findall(text):
        key = SETTINGS.get(name) or next((key for key in all_keys() if key[-1] == name), None)
        if key is None:
            assert name in LEAVES, f"{where}: there is no setting {name}"
            continue
        field = Recipe.model_fields[key[0]]
        if len(key) > 1:
            field = section_of(field.annotation).model_fields[key[1]]  # type: ignore[union-attr]
        annotated: Any = field.annotation
        if field.metadata:
            from typing import Annotated

            annotated = Annotated[(field.annotation, *field.metadata)]
        try:
            TypeAdapter(annotated).validate_python(yaml.safe_load(value.rstrip(".")))
        except ValidationError as error:
            raise AssertionError(f"{where}: {name}: {value} is refused: {error}") from None


def lines_of_commands() -> Iterator[tuple[str, str]]:
    """Whole `lora` commands in fixes, those in other words left out."""
    for where, text in FIXES:
        for found in re.findall(
            r"(?:^|[:;`] )(lora [a-z]+(?: (?:--?[\w-]+|[A-Z]+|\[.*?\]|[\w./…=\N{MIDDLE DOT}-]+))*)", text
        ):
            yield where, found


@pytest.mark.parametrize(("where", "line"), list(lines_of_commands()))
def test_a_command_in_a_fix_is_one_that_the_command_line_takes(where: str, line: str):
    """Optional parts in brackets are tried with and without."""
    for words in {re.sub(r" \[.*?\]", "", line), line.replace("[", "").replace("]", "")}:
        verb, *rest = shlex.split(words.partition(" > ")[0])[1:]
        assert COMMANDS[verb].make_context(verb, [PLACE if word == "…" else word for word in rest])


def test_commands_are_quoted_in_one_place():
    """A path inside the text of a command is not quoted; command() does it."""
    for path in sorted((ROOT / "lora_cli").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "errors.py":
            assert "shlex" not in text, f"{path}: use errors.command"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                shown = text_of(node)
                assert not re.search(rf"\blora (?:train|check|runs|eval|merge) {PLACE}", shown), f"{path}:{node.lineno}"
                assert "lora-cli[" not in shown
    assert issubclass(LoraError, Exception)
