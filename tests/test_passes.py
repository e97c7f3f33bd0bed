"""The passes that change a loaded model: their order, what each puts around a forward, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import quiet_console

from lora_cli.adapters.targets import block_lists
from lora_cli.adapters.trained import trained_parameters
from lora_cli.base.surgery import forward_layers
from lora_cli.recipe import load_recipe
from lora_cli.training import passes
from lora_cli.training.opening import open_session
from lora_cli.training.passes import PASSES, Pass, run_passes


def opened(recipe_file: Any, **settings: Any) -> Any:
    return open_session(load_recipe(recipe_file(**settings)), quiet_console())


def test_passes_have_one_order_and_each_its_name():
    """Attention is tried where the model trains, so after sharding; blocks are measured as they will run, so last."""
    assert [each.name for each in PASSES] == [
        "adapters", "kernels", "recomputation", "sharding", "attention", "loss", "compilation", "checkpointing",
    ]  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_what_lies_around_the_forwards_of_a_model(recipe_file, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)  # only where it is put matters here
    model = opened(recipe_file, train={"gradient_checkpointing": "full", "compile": compiled}).model
    blocks = [block for name in block_lists(model) for block in model.get_submodule(name)]
    found = {name: layers for name, module in model.named_modules() if (layers := forward_layers(module))}
    of_blocks = {name: layers for name, layers in found.items() if model.get_submodule(name) in blocks}
    assert len(of_blocks) == len(blocks)
    assert set(of_blocks.values()) == {("compilation", "checkpointing") if compiled else ("checkpointing",)}
    others = found.keys() - of_blocks.keys()
    assert not others if compiled else {found[name] for name in others} == {("recomputation",)}
    assert compiled or len(others) == 3 * len(blocks) + 1  # two norms and an MLP in each block, and the last norm


def test_a_pass_that_does_not_apply_is_left_out_and_the_others_say_what_they_did(recipe_file):
    said: list[str] = []
    calls: list[str] = []

    def made(name: str, applies: bool) -> Pass:
        def apply(_: Any) -> Any:
            calls.append(name)
            yield name, "done"
            yield "", "and more"

        return Pass(name, apply, lambda recipe: applies)

    class Loaded:
        recipe, say = None, said.append

    run_passes([made("one", True), made("two", False), made("three", True)], Loaded())  # type: ignore[arg-type]
    assert calls == ["one", "three"]
    assert said == ["one      done", "         and more", "three    done", "         and more"]


@pytest.mark.parametrize(("enough", "recomputed"), [(10**6, 2), (1, 0)])
def test_selective_plans_for_a_micro_batch_that_is_large_enough_where_its_size_is_open(
    recipe_file, monkeypatch, enough, recomputed
):
    """Room for the longest row and not for the step: no block is recomputed only to have more rows at once."""
    monkeypatch.setattr(passes, "_ENOUGH_TOKENS", enough)
    monkeypatch.setattr(passes, "_FREE_SHARE", 1.0)
    free = [0]
    monkeypatch.setattr(passes, "free_memory_bytes", lambda _: free[0])
    train = {"micro_batch_size": "auto", "batch_size": 24, "gradient_checkpointing": "selective"}
    settings = {"train": train, "data": {"packing": False}}
    whole = opened(recipe_file, **settings)
    longest = max(len(example.ids) for example in whole.feed.largest())
    states = 12 * sum(each.numel() for each in trained_parameters(whole.model))
    free[0] = states + round(longest * sum(whole.activations.bytes_per_token)) + 1
    assert sum(opened(recipe_file, **settings).activations.recomputed) == recomputed
    free[0] = states - 1
    assert sum(opened(recipe_file, **settings).activations.recomputed) == 2


@pytest.mark.parametrize("target_modules", ["attention", "all-linear"])
def test_layers_that_share_an_input_are_joined(recipe_file, target_modules):
    """q, k and v; gate and up. The loss is tried with a forward pass of its own, which must not hide it."""
    session = opened(recipe_file, adapter={"target_modules": target_modules})
    names = {id(layer): name.split(".")[-1] for name, layer in session.layers.items()}
    groups = {name: [names[id(each)] for each in layer.beside] for name, layer in session.layers.items()}
    for name, group in groups.items():
        kind = name.split(".")[-1]
        together = next(
            (each for each in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]) if kind in each), None
        )
        assert group == (together or [kind])
    assert len(groups) == 2 * (7 if target_modules == "all-linear" else 4)
