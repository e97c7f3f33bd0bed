"""What is tried on a model before it is trained: it sees only the past, and keeps packed examples apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import quiet_console, refusal, save_tiny
from tiny_types import tiny_config

from lora_cli.base.attention import attention_implementation
from lora_cli.base.trials import packing_difference, require_causal, require_no_leak
from lora_cli.errors import LoraError
from lora_cli.planning.check import check
from lora_cli.planning.skeleton import look_at_model
from lora_cli.recipe import load_recipe
from lora_cli.training.train import train

CPU = torch.device("cpu")
ENCODERS = ["bert", "roberta", "electra", "roformer", "xlm-roberta-xl"]


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    how = attention_implementation(config)
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=how).eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_encoder_is_refused_by_train_check_and_init_in_the_same_words(dtype, tmp_path: Path, recipe_file: Any):
    folder = save_tiny(tiny_config("bert"), tmp_path / "bert")
    recipe = load_recipe(recipe_file(base_model=str(folder), dtype=dtype, data={"packing": False}))
    trained = refusal(lambda: train(recipe, quiet_console()))
    assert trained.what == "BertLMHeadModel is not causal: it sees the tokens that it is to predict"
    for call in (lambda: check(recipe), lambda: look_at_model(str(folder))):
        assert (refusal(call).what, refusal(call).fix) == (trained.what, trained.fix)


def test_the_way_out_for_an_encoder_that_was_trained_as_a_decoder(tmp_path: Path, recipe_file: Any):
    """The fix that is named is followed, and the outcome changes."""
    folder = save_tiny(tiny_config("bert"), tmp_path / "bert")
    recipe = load_recipe(recipe_file(base_model=str(folder), data={"packing": False}, train={"max_steps": 2}))
    assert "write is_decoder: true in config.json" in str(refusal(lambda: check(recipe)).fix)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_decoder": True}))
    check(recipe)
    train(recipe, quiet_console())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_what_sees_the_next_token_is_refused(kind, dtype):
    with pytest.raises(LoraError, match="is not causal"):
        require_causal(model_of(tiny_config(kind), dtype), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "mixtral", "gpt_oss", "mamba2", "qwen3_next", "deepseek_v3", "gemma3"]
)
def test_what_sees_only_the_past_is_not(kind, dtype):
    model = model_of(tiny_config(kind), dtype).train()
    require_causal(model, CPU)
    assert model.training


def test_a_model_that_computes_nan_is_refused_for_that(tmp_path: Path, recipe_file: Any):
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    folder = save_tiny(tiny_config("llama"), tmp_path / "nan")
    model.save_pretrained(folder)
    recipe = load_recipe(recipe_file(base_model=str(folder)))
    assert refusal(lambda: train(recipe, quiet_console())).what == "LlamaForCausalLM computes NaN in float32"


def test_few_recurrent_layers_among_attention_leak_in_16_bits_too():
    """Of their difference from each example alone, rounding hides them: only another neighbour brings them out."""
    config = tiny_config("lfm2")
    config.layer_types = [*3 * ["full_attention"], "conv", *2 * ["full_attention"]]
    config.num_hidden_layers = 6
    model = model_of(config, torch.bfloat16)
    difference, leaking = packing_difference(model, CPU)
    assert difference < 0.25 * leaking, "or the difference alone would refuse it"
    assert "another first example moves the logits" in refusal(lambda: require_no_leak(model, CPU)).details[0]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3", "deepseek_v3"])
def test_what_keeps_examples_apart_packs_in_16_bits(kind):
    model = model_of(tiny_config(kind), torch.bfloat16)
    require_no_leak(model, CPU)
    packed, leaking = packing_difference(model, CPU)
    assert packed < leaking / 4


@pytest.mark.parametrize("error", [TypeError("enable_gqa?"), RuntimeError("head_dim must be equal")])
def test_code_that_fails_on_packed_rows_is_not_called_a_leak(monkeypatch, error):
    """A kernel with another signature, or for other sizes: the reason is its own."""
    model = model_of(tiny_config("llama"))
    own = model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if "cu_seq_lens_q" in named:
            raise error
        return own(*inputs, **named)

    monkeypatch.setattr(model, "forward", forward)
    said = refusal(lambda: require_no_leak(model, CPU))
    assert said.what == f"LlamaForCausalLM cannot compute packed rows: {type(error).__name__}: {error}"
    assert said.fix == "write data.packing: false"


def test_code_that_fails_on_any_row_is_not_blamed_on_packing(monkeypatch):
    model, nothing = model_of(tiny_config("llama")), []
    monkeypatch.setattr(model, "forward", lambda **_: nothing[0])
    for trial in (require_causal, require_no_leak):
        said = refusal(lambda trial=trial: trial(model, CPU))
        assert said.what == "LlamaForCausalLM cannot compute a row of text: IndexError: list index out of range"
        assert "packing" not in str(said.fix)


def test_a_model_that_sees_few_tokens_is_tried_with_few():
    config = tiny_config("gpt2")
    config.n_positions = 16
    model = model_of(config)
    require_causal(model, CPU)
    require_no_leak(model, CPU)
    packed, leaking = packing_difference(model, CPU)
    assert packed < 1e-3 < leaking


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next", "falcon"])
def test_check_refuses_packing_where_training_does(kind, tmp_path: Path, recipe_file: Any):
    """And the fix of both, followed, trains."""
    folder = save_tiny(tiny_config(kind), tmp_path / kind)
    settings = {"base_model": str(folder), "adapter": {"target_modules": "all-linear", "rank": 1}}
    recipe = load_recipe(recipe_file(**settings))
    trained, checked = refusal(lambda: train(recipe, quiet_console())), refusal(lambda: check(recipe))
    assert (checked.what, checked.fix) == (trained.what, trained.fix)
    assert trained.fix == "write data.packing: false"
    recipe = load_recipe(recipe_file(**settings, data={"packing": False}, train={"max_steps": 2}))
    check(recipe)
    train(recipe, quiet_console())


@pytest.mark.parametrize("kind", ["doge", "gemma4_unified", "deepseek_v32"])
def test_a_mask_that_the_architecture_asks_for_is_not_taken_for_packing(kind, tmp_path: Path, tokenizer: Any):
    """Doge adds to it, others read it: whoever gets none attends to what comes later, or fails."""
    from lora_cli.base.load import load_model
    from lora_cli.base.source import find_base

    folder = save_tiny(tiny_config(kind), tmp_path / kind, tokenizer=tokenizer)
    model = load_model(find_base(str(folder)), quantization="none", dtype=torch.float32, device=CPU)
    ids = torch.arange(10, 50)[None]
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        own, expected = model(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
