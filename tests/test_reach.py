"""Adapters go where text reaches them; what is left out is said, or refused where a person named it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import quiet_console, save_tiny
from safetensors.torch import load_file
from tiny_types import tiny_config

from lora_cli.adapters.targets import block_lists, find_targets, linear_layers
from lora_cli.errors import LoraError
from lora_cli.planning.check import _lines, check
from lora_cli.recipe import load_recipe
from lora_cli.training.opening import open_session
from lora_cli.training.train import train

# Per type: where the adapters lie, and what is left out because text never reaches it.
COMPOSITE = {
    "gemma3": ("model.language_model.layers.", "model.vision_tower"),
    "got_ocr2": ("model.language_model.layers.", "model.vision_tower"),
    "moss_transcribe_diarize": ("model.language_model.layers.", "model.audio_tower"),
    "git": ("git.encoder.layer.", "git.image_encoder"),
    "phi4_multimodal": ("model.layers.", "model.embed_tokens_extend.image_embed.img_processor"),
}
UNREACHED = {  # by all-linear; written down from each architecture's code
    "mamba": "mixer.dt_proj",  # its weight is multiplied by as it is
    "bart": "encoder_attn.q_proj",  # waits for an encoder
    "deepseek_v32": "self_attn.indexer.wq_b",  # chooses tokens, without a gradient
    "longcat_flash": "mlp.router.classifier",
}


class Saying:
    """A console that keeps what is printed on it."""

    is_terminal = False

    def __init__(self) -> None:
        self.said: list[str] = []

    def print(self, *texts: Any, **_: Any) -> None:
        self.said += map(str, texts)


def said_by_training(recipe: Any) -> tuple[Any, str]:
    console: Any = Saying()
    session = open_session(recipe, console)
    return session, "\n".join(console.said)


@pytest.mark.parametrize("target_modules", ["attention", "all-linear"])
@pytest.mark.parametrize("kind", COMPOSITE)
def test_pictures_and_sound_are_left_out_and_said(kind, target_modules):
    inside, tower = COMPOSITE[kind]
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(tiny_config(kind))
    names = [target.name for target in find_targets(model, target_modules, rank=1, alpha=1)]
    assert names
    assert all(name.startswith(inside) for name in names)
    assert all(f"{blocks}.".startswith(inside) for blocks in block_lists(model))
    assert not any(name.startswith(f"{tower}.") for name in linear_layers(model))


@pytest.mark.parametrize("kind", ["gemma3", "phi4_multimodal"])
def test_check_and_train_say_what_is_left_out(kind, tmp_path: Path, recipe_file: Any):
    folder = save_tiny(tiny_config(kind), tmp_path / kind)
    recipe = load_recipe(recipe_file(base_model=str(folder), adapter={"rank": 1}))
    wanted = f"linear layers of {COMPOSITE[kind][1]} are left out: they see no text"
    assert wanted in said_by_training(recipe)[1]
    assert any(wanted in text for _, text in _lines(check(recipe)))


@pytest.mark.parametrize("kind", UNREACHED)
def test_what_no_gradient_reaches_is_left_out_of_all_linear(kind, tmp_path: Path, recipe_file: Any):
    folder = save_tiny(tiny_config(kind), tmp_path / kind)
    settings: dict[str, Any] = {"base_model": str(folder), "data": {"packing": False}}
    recipe = load_recipe(recipe_file(**settings, adapter={"rank": 1, "target_modules": "all-linear"}))
    session, said = said_by_training(recipe)
    assert not any(UNREACHED[kind] in name for name in session.layers)
    assert "layers are left out, because no gradient of text reaches them" in said
    assert UNREACHED[kind] in said
    checked = check(recipe)
    assert (len(checked.targets), any(UNREACHED[kind] in text for _, text in _lines(checked))) == (
        len(session.layers),
        True,
    )


def test_a_named_layer_that_no_gradient_reaches_is_refused_and_the_way_out_works(tmp_path: Path, recipe_file: Any):
    folder = save_tiny(tiny_config("mamba"), tmp_path / "mamba")
    adapter: dict[str, Any] = {"rank": 1, "target_modules": ["in_proj", "dt_proj"]}
    settings: dict[str, Any] = {"base_model": str(folder), "data": {"packing": False}, "train": {"max_steps": 2}}
    recipe = load_recipe(recipe_file(**settings, adapter=adapter))
    for call in (lambda: train(recipe, quiet_console()), lambda: check(recipe)):
        with pytest.raises(LoraError, match="no gradient of text reaches 2 of the layers") as error:
            call()
        assert error.value.fix == "write adapter.exclude_modules: [mixer.dt_proj]"
    recipe = load_recipe(recipe_file(**settings, adapter=adapter | {"exclude_modules": ["mixer.dt_proj"]}))
    check(recipe)
    train(recipe, quiet_console())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_composite_model_from_training_to_peft_and_merge(quantization, tmp_path: Path, run_recipe: Any):
    """Gemma 3 with a vision tower: train → PEFT opens the adapter → merge, and both compute what was trained."""
    from peft import PeftModel

    from lora_cli.adapters.opened import open_model
    from lora_cli.merging.merge import merge

    folder = save_tiny(tiny_config("gemma3"), tmp_path / "gemma3")
    run, _ = run_recipe(
        base_model=str(folder), quantization=quantization, adapter={"rank": 2, "target_modules": "all-linear"}
    )
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in stored)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    ids = torch.arange(10, 40)[None]
    opened = open_model(None, run, dtype="fp32", device="cpu").model
    with torch.no_grad():
        expected = opened(input_ids=ids).logits
        if quantization == "none":
            base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            without = base(input_ids=ids).logits
            theirs = PeftModel.from_pretrained(base, str(run / "adapter")).eval()(input_ids=ids).logits
            assert (expected - without).abs().max() > 1e-3, "or the adapter does nothing"
            torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)
        merge(run, tmp_path / "merged", dtype="fp32")
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    before, after = (set(load_file(each / "model.safetensors")) for each in (folder, tmp_path / "merged"))
    assert after == before, "names of tensors are the checkpoint's own, those of the vision tower too"
