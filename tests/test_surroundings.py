"""Variables of others, which accelerate and torch read: what they ask for is refused by name, or the recipe says it."""

import os
import shlex
import sys

import pytest
from accelerate.state import AcceleratorState, PartialState
from conftest import losses, quiet_console

from lora_cli import surroundings
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.training.train import train


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets or a mend removes comes back."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    for name in surroundings._OF_A_LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_state():
    """accelerate reads the environment once a process."""
    before = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    PartialState._shared_state.clear()
    AcceleratorState._shared_state.clear()
    yield
    for state, values in zip((PartialState, AcceleratorState), before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "FSDP", "SAGEMAKER", "PARALLELISM_CONFIG", "TP"])
@pytest.mark.parametrize("value", ["true", "1", "junk"])
def test_another_way_of_training_is_refused_by_the_name_of_its_variable(name, value, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    with pytest.raises(LoraError, match=f"ACCELERATE_USE_{name}={value}") as told:
        surroundings.settle()
    _follow(told.value, monkeypatch)
    surroundings.settle()


def _follow(error: LoraError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `unset …` in the fix says."""
    words = shlex.split(str(error.fix).split(";")[0].split(" for one")[0])
    assert words[0] == "unset"
    for name in words[1:]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
        ("ACCELERATE_DYNAMO_BACKEND", "junk"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:7"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DEBUG_MODE", "perhaps"),
        ("ACCELERATE_CPU_AFFINITY", "x"),
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("FORK_LAUNCHED", "junk"),
    ],
)
def test_settings_of_accelerate_are_the_recipes_to_make(name, value, monkeypatch, fresh_state, run_recipe, tmp_path):
    plain, _ = run_recipe(output=str(tmp_path / "plain"))
    PartialState._shared_state.clear()
    AcceleratorState._shared_state.clear()
    monkeypatch.setenv(name, value)
    surroundings.settle()
    run, _ = run_recipe()
    assert losses(run) == losses(plain)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "1"},
        {"LOCAL_RANK": "x"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "here"},
    ],
)
def test_half_a_launch_is_refused_by_its_variables_and_not_waited_for(variables, monkeypatch, recipe_file, fresh_state):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoraError) as told:
        surroundings.settle()
    assert told.value.where == "the environment"
    assert any(name in told.value.what for name in variables)
    _follow(told.value, monkeypatch)
    surroundings.settle()
    assert train(load_recipe(recipe_file()), quiet_console())["steps"] == 4


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "1"}, {"RANK": "0", "LOCAL_RANK": "0"}, {"MASTER_ADDR": "node7"}])
def test_a_launch_of_one_process_is_one_process(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    surroundings.settle()
    assert not [name for name in variables if name in os.environ]


def test_a_whole_launch_stays(monkeypatch):
    variables = dict(zip(surroundings._OF_A_LAUNCHER, ("1", "1", "2", "localhost", "29500"), strict=True))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    surroundings.settle()
    assert {name: os.environ[name] for name in variables} == variables


def test_the_command_settles_them(monkeypatch, recipe_file, capsys):
    from lora_cli.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["lora", "train", str(recipe_file())])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "WORLD_SIZE=2" in capsys.readouterr().err
