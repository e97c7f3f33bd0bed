"""A model's own Python code runs only after the person at the command line said so."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Said

CODE = """\
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()


class EvilConfig(GPT2Config):
    model_type = "evil"


class Evil(GPT2LMHeadModel):
    config_class = EvilConfig
"""


@pytest.fixture
def evil(model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model that ships code, and the file that the code makes when it runs."""
    marker = tmp_path / "it-ran"
    mapped = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    return model({"evil.py": CODE.format(marker=str(marker))}, model_type="evil", auto_map=mapped), marker


def test_check_says_that_it_runs_code(lora: Callable[..., Said], recipe_file: Callable[..., Path], evil: tuple) -> None:
    folder, marker = evil
    assert lora("check", recipe_file(base_model=str(folder))).code == 2
    assert not marker.exists()
    said = lora("check", recipe_file(base_model=str(folder), trust_remote_code=True))
    assert f"note: runs the Python code of {folder}" in said.text
    assert marker.exists()


@pytest.mark.parametrize("command", ["check", "train", "eval"])
def test_a_run_folder_cannot_say_so_by_itself_and_the_fix_works(
    lora: Callable[..., Said], recipe_file: Callable[..., Path], evil: tuple, tmp_path: Path, command: str
) -> None:
    folder, marker = evil
    (tmp_path / "run").mkdir()
    written = recipe_file(base_model=str(folder), trust_remote_code=True, data={"validation": 0.2})
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(written.read_text())
    source = tmp_path / "run" if command == "eval" else recipe
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    said = lora(command, source)
    assert said.code == 2, said.text
    assert "may be a stranger's" in said.error
    assert not marker.exists()
    fix = ["--trust-remote-code"] if command == "eval" else ["--set", "trust_remote_code=true"]
    assert f"add {' '.join(fix)}" in said.error
    assert "may be a stranger's" not in lora(command, source, *fix).text
    assert marker.exists() or command != "check"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "evil"


def test_the_command_that_goes_on_with_a_run_says_it_again(
    lora: Callable[..., Said], recipe_file: Callable[..., Path], evil: tuple, tmp_path: Path
) -> None:
    folder, _ = evil
    recipe = recipe_file(
        base_model=str(folder),
        trust_remote_code=True,
        output=str(tmp_path / "run"),
        train={"epochs": 1, "max_steps": 1},
    )
    assert lora("train", recipe).code in (0, 3)
    words = shlex.split(lora("train", recipe).error.split("train it longer with: ")[1].partition(";")[0])
    assert words[:2] == ["lora", "train"]
    longer = lora(*words[1:])
    assert longer.code in (0, 3), longer.text
    assert f"note: runs the Python code of {folder}" in longer.text
