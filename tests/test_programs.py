"""What other programs refuse of an adapter: the rules, on adapters as PEFT writes them; of PEFT, what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import open_base, refusal, with_adapter
from safetensors.torch import load_file, save_file

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.programs import RULES, VLLM_RANKS, Looked, Program, look_at, refused, require_taken
from lora_cli.base.source import find_base
from lora_cli.cli import common
from lora_cli.recipe import load_recipe

ALL = get_args(Program)
USUAL: dict[str, Any] = {"r": 8, "lora_alpha": 16, "bias": "none", "rank_pattern": {}, "use_dora": False}


def refusing(looked: Looked) -> set[str]:
    return {program for program in ALL if refused(looked, program)} - {"mlx"}


@pytest.fixture
def peft_adapter(tiny_llama: Path, tmp_path: Path) -> Any:
    """Writes an adapter as PEFT saves it, with these settings; returns its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def write(**settings: Any) -> Path:
        config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | settings))
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


def test_every_program_of_the_command_line_has_rules():
    assert {each for rule in RULES for each in rule.programs} == set(ALL)
    assert set(get_args(get_args(get_args(common.Program)[0])[0])) == set(ALL)
    assert all(rule.source.startswith("https://github.com/") for rule in RULES)


@pytest.mark.parametrize(
    ("settings", "programs"),
    [
        ({}, set()),
        ({"use_dora": True}, {"vllm", "llama.cpp", "ollama"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm", "llama.cpp", "ollama"}),
        ({"bias": "all"}, {"vllm"}),  # this model has no biases that would be saved
        ({"use_rslora": True}, {"llama.cpp", "ollama"}),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {"vllm"}),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, {"vllm", "llama.cpp", "ollama"}),
    ],
)
def test_what_peft_writes_is_judged(settings: dict[str, Any], programs: set[str], peft_adapter):
    looked = look_at(peft_adapter(**settings))
    assert looked.ranks
    assert refusing(looked) == programs
    assert refused(looked, "mlx")


@pytest.mark.parametrize(
    ("changed", "more", "programs"),
    [
        ({"lora_alpha": 16.5}, {}, {"ollama"}),
        ({"lora_bias": True}, {"names": ["base_model.model.x.lora_B.bias"]}, {"vllm", "llama.cpp", "ollama"}),
        ({"init_lora_weights": "pissa_niter_4"}, {}, {"vllm", "llama.cpp", "ollama"}),
        ({"use_qalora": True}, {}, {"vllm", "llama.cpp", "ollama"}),
        ({"use_dora": True}, {}, {"vllm", "llama.cpp", "ollama"}),
        ({}, {"ranks": {"lm_head": 8}, "tied": True}, {"llama.cpp", "ollama"}),
        ({}, {"ranks": {"lm_head": 8}}, set()),
        ({}, {"model_type": "qwen3"}, {"ollama"}),
        ({}, {"model_type": "llama"}, set()),
        ({}, {"ranks": {"x": 513}}, {"vllm"}),
        ({}, {"ranks": {"x": 512}}, set()),
    ],
)
def test_rules_by_themselves(changed: dict[str, Any], more: dict[str, Any], programs: set[str]):
    assert refusing(Looked(USUAL | changed, **({"ranks": {"x": 8}} | more))) == programs


def test_vllm_is_told_the_smallest_rank_that_it_takes():
    for rank, told in ((1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)):
        assert f"--max-lora-rank {told};" in require_taken(Looked(USUAL, {"x": rank, "y": 1}), "vllm")
        assert told in VLLM_RANKS


@pytest.mark.parametrize("name", ["_orig_mod.", "module."])
def test_names_that_peft_is_said_to_miss_it_does_miss(name: str, tiny_llama: Path, tmp_path: Path):
    """The adapter of a compiled model: PEFT loads it with a warning, and computes the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = with_adapter(open_base(tiny_llama))
    save_adapter(model, adapter, find_base(str(tiny_llama)), quantization="none", double_quantization=True)
    path, ids = adapter / "adapter_model.safetensors", torch.arange(8)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert refusing(look_at(adapter)) == set()
    renamed = {
        f"base_model.model.{name}{key.removeprefix('base_model.model.')}": t for key, t in load_file(path).items()
    }
    if name == "module.":
        renamed = {key.replace("base_model.model.module.", "module.base_model.model."): t for key, t in renamed.items()}
    save_file(renamed, path, {"format": "pt"})
    assert {"peft", "transformers", "vllm" if name == "module." else "peft"} <= refusing(look_at(adapter))
    before = base(ids).logits
    with pytest.warns(UserWarning, match="missing adapter keys"):
        opened = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, before)


@pytest.mark.parametrize(
    "adapter",
    [{}, {"rank_pattern": {"q_proj": 2}}, {"rank": 3, "rank_stabilized": True}, {"alpha_pattern": {"q_proj": 4}}],
    ids=str,
)
def test_a_recipe_is_judged_as_the_adapter_that_it_makes(adapter: dict[str, Any], run_recipe, recipe_file, lora):
    from lora_cli.planning.check import check

    settings: Any = {"adapter": adapter, "train": {"max_steps": 1}}
    run, _ = run_recipe(**settings)
    planned, made = check(load_recipe(recipe_file(**settings))).looked(), look_at(run / "adapter")
    assert {key: made.config[key] for key in planned.config} == planned.config
    assert planned.ranks == {name.removeprefix("base_model.model."): rank for name, rank in made.ranks.items()}
    for program in ALL:
        assert bool(refused(planned, program)) == bool(refused(made, program)), program
    assert refusing(made) == ({"vllm"} if "rank_pattern" in adapter else {"ollama"} if "rank" in adapter else set())


def test_the_commands_say_it(recipe_file, peft_adapter, tiny_llama: Path, lora):
    recipe = recipe_file(adapter={"rank_pattern": {"q_proj": 2}})
    said = lora("check", recipe, "--for", "peft", "--show", "0")
    assert said.code == 0
    assert "peft takes this adapter" in said.out
    document = json.loads(lora("check", recipe, "--for", "peft", "--json").out)
    assert "takes this adapter" in document["program"]
    adapter = peft_adapter(use_dora=True)
    said = lora("inspect", adapter, "--for", "vllm", "--base", tiny_llama)
    assert said.code == 3
    assert (
        "vllm does not take this adapter as it is\n  vLLM refuses an adapter with use_dora: True (https://"
        in said.error
    )
    assert said.error.count("https://") == 3
    assert "fix: merge it" in said.error
    assert lora("inspect", adapter, "--for", "peft").code == 0


@pytest.mark.parametrize("alpha", ["x", None, [1]])
def test_an_alpha_that_is_not_a_number_is_refused_for_every_program(alpha: Any, peft_adapter):
    """It was a traceback for Ollama, and nothing for vLLM."""
    folder = peft_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    assert "not a finite number" in refusal(lambda: look_at(folder)).what
