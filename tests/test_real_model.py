"""A real model, SmolLM2-135M-Instruct, in 4-bit, through the same path as the demo."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import text_to_sql
import torch
from conftest import ROOT, losses, quiet_console, write_rows

from lora_cli.adapters.opened import open_model
from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.evaluation.evaluate import evaluate_model, evaluate_run
from lora_cli.evaluation.generation import complete, generation_config
from lora_cli.evaluation.perplexity import example_losses
from lora_cli.recipe import load_recipe
from lora_cli.training.train import train

pytestmark = pytest.mark.real_model

PARAGRAPH = (
    "The river rises in the mountains, where snow falls from November to April, and runs south through three countries "
    "before it reaches the sea. Farmers have used its water for more than two thousand years."
)


@pytest.fixture(autouse=True)
def _both_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_perplexity_of_plain_english_is_that_of_a_language_model_and_survives_nf4(real_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_rows(tmp_path / "text.jsonl", [{"text": PARAGRAPH}])
    plain = evaluate_model(str(real_model), None, data, quantization="none", dtype="fp32")["base"]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    ids = torch.tensor([[*tokenizer(PARAGRAPH)["input_ids"], tokenizer.eos_token_id]])
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    with torch.no_grad():
        assert plain.loss == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-4)
    assert 10 < plain.perplexity < 50  # 39 tokens of plain English; guessing would give 49,152
    assert 0.7 < plain.bits_per_byte < 1.3
    quantized = evaluate_model(str(real_model), None, data, quantization="nf4")["base"]
    assert quantized.loss == pytest.approx(plain.loss, abs=0.2)  # NF4 costs a model of this size about a tenth of a nat
    assert quantized.loss != plain.loss


def test_int8_has_one_loss_for_every_grouping_in_training_and_evaluation(real_model, tmp_path):
    """Through bitsandbytes' own product eight examples gave 3.9515, 3.9477 and 3.9533 by their grouping alone."""
    rows = text_to_sql.make_rows(8, seed=1, held_out=False)
    held_out = write_rows(tmp_path / "validation.jsonl", rows)
    settings = {
        "quantization": "int8",
        "dtype": "fp32",
        "data.train": write_rows(tmp_path / "train.jsonl", text_to_sql.make_rows(8, seed=2, held_out=False)),
        "data.validation": held_out,
        "data.general_text": "null",
        "train.max_steps": 1,
        "train.eval_every": "null",
        "output": tmp_path / "run",
    }
    recipe = load_recipe(ROOT / "configs" / "demo-text-to-sql.yaml", [f"{k}={v}" for k, v in settings.items()])
    report = train(recipe, quiet_console())
    scores = evaluate_run(tmp_path / "run", None)
    assert scores["base"].loss == pytest.approx(report["base_validation_loss"], abs=1e-6)
    opened = open_model(None, tmp_path / "run", dtype="fp32")
    tokenized = [np.array(opened.tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    examples = [Example(ids, [(1, len(ids), 1.0)]) for ids in tokenized]
    lay_out = partial(collate, packed=True, pad_id=0, device=torch.device("cpu"))
    scored = [example_losses(opened.model, examples, lay_out, most) for most in (128, 512, 4096)]
    grouped = [losses.sum().item() / int(targets.sum()) for losses, targets in scored]
    assert grouped == pytest.approx([grouped[0]] * 3, abs=1e-6)


def test_it_answers_in_its_own_chat_template(real_model):
    opened = open_model(str(real_model), None)
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = opened.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    config = generation_config(opened.model, opened.tokenizer, max_new_tokens=12)
    (completion,) = complete(opened.model, opened.tokenizer, [prompt], config)
    assert "Paris" in completion.text


def test_the_demo_recipe_learns_in_six_steps_and_the_adapter_loads_in_peft(real_model, tmp_path):
    rows = text_to_sql.make_rows(160, seed=1, held_out=False)
    data = write_rows(tmp_path / "train.jsonl", rows[:140])
    held_out = write_rows(tmp_path / "validation.jsonl", rows[140:])
    settings = {
        "data.train": data,
        "data.validation": held_out,
        "data.max_seq_len": 256,
        "train.max_steps": 6,
        "train.eval_every": 6,
        "output": tmp_path / "run",
    }
    recipe = load_recipe(ROOT / "configs" / "demo-text-to-sql.yaml", [f"{k}={v}" for k, v in settings.items()])
    report = train(recipe, quiet_console())
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] / 2
    assert report["best_validation_loss"] < report["base_validation_loss"] / 2
    assert report["adapted_layers"] == 210

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    ours = open_model(None, tmp_path / "run", quantization="none", dtype="fp32")
    tokens = torch.tensor([ours.tokenizer(PARAGRAPH)["input_ids"]])
    with torch.no_grad():
        difference = (ours.model(tokens, use_cache=False).logits - theirs(tokens).logits).abs().max()
    assert difference < 1e-3  # logits of about 20, fp32 sums over 30 layers
