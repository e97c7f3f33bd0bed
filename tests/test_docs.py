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


def test_every_file_that_contributing_names_exists():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    for line in table:
        room = ROOT
        for name in re.findall(r"`(?:python )?([\w/]+(?:\.py|/))`", line):
            place = ROOT / name if "/" in name else room / name  # a name alone is a neighbour of the one before
            assert place.exists(), line
            room = place if place.is_dir() else place.parent


def test_the_house_in_design_names_every_room():
    house = (ROOT / "docs" / "design.md").read_text().split("## The house")[1].split("```")[1]
    package = ROOT / "lora_cli"
    for path in package.iterdir():
        if (path.is_dir() and (path / "__init__.py").exists()) or (path.suffix == ".py" and path.name[0] != "_"):
            assert path.name in house, f"docs/design.md lacks {path.name}"


def test_every_command_and_option_in_the_readme_exists():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text()
    for name, options in re.findall(r"^\$? ?lora ([a-z]+)([^#\n]*)", text, flags=re.MULTILINE):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", options)) <= known


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_script_that_is_named_takes_the_options_that_are_given(document):
    for name, rest in re.findall(r"`[A-Z_=0-9 ]*(?:python|pytest) ([\w/.]+\.py)([^`]*)`", document.read_text()):
        script = ROOT / name
        assert script.is_file(), f"{document.name} names {name}"
        parts = " ".join(path.read_text() for path in script.parent.glob("*.py"))
        for word in set(re.findall(r"(?<= )(?:--[a-z-]+|[a-z][a-z0-9-]*)(?= |$)", rest)) - {"--help"}:
            assert word in parts, f"{document.name}: {name} takes no {word}"
