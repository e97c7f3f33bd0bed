"""What the documents say is what there is."""

from __future__ import annotations

import re

import pytest
import recipe_reference
import tiny_model
from conftest import ROOT
from typer.main import get_command

from lora_cli.cli import app


def test_the_settings_table_is_the_schema():
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_reference.reference()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"lora train configs/{path.name}" in line for line in head)


def test_the_smoke_data_is_what_its_script_makes():
    assert (ROOT / "tests" / "data" / "smoke.jsonl").read_text() == tiny_model.smoke_rows()


def test_every_file_in_the_readme_tree_exists():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    package = ROOT / "lora_cli"
    room = package
    for line in tree.splitlines():
        found = re.match(r"( *)([\w./]+)(/|\.py) ", line)
        if not found:
            continue
        indent, name = len(found[1]), found[2] + found[3]
        base = {0: ROOT, 2: package, 4: room}[indent]
        assert (base / name).exists(), line
        if name.endswith("/") and indent == 2:
            room = base / name
    for file in package.rglob("*.py"):
        if file.parent in (package, package / "base", package / "adapters", package / "data") and file.name[0] != "_":
            assert file.name in tree, f"the README's tree lacks {file.name}"


def test_every_command_and_option_in_the_readme_exists():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text()
    for name, options in re.findall(r"^\$? ?lora ([a-z]+)([^#\n]*)", text, flags=re.MULTILINE):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", options)) <= known
