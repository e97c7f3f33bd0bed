"""Generation does what was asked for: no settings of the model's own, no text made of NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file, save_file

from lora_cli.adapters.opened import open_model
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.evaluation.evaluate import evaluate_model
from lora_cli.evaluation.generation import complete, generation_config

PROMPT = "question answer user"


def with_settings(base: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(base, folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(own | settings))
    return folder


def answer(base: Path, **settings: Any) -> str:
    opened = open_model(str(base), None, device="cpu", dtype="fp32")
    config = generation_config(opened.model, opened.tokenizer, max_new_tokens=24, **settings)
    return complete(opened.model, opened.tokenizer, [PROMPT], config)[0].text


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 1},
        {"stop_strings": ["e"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"max_time": 0.0},
        {"min_new_tokens": 20},
        {"repetition_penalty": 5.0},
        {"suppress_tokens": list(range(200))},
        {"forced_eos_token_id": 0},
        {"guidance_scale": 3.0},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"max_length": 1},
    ],
)
def test_settings_of_the_model_do_not_change_what_greedy_means(settings, tiny_llama, tmp_path):
    model = open_model(str(tiny_llama), None, device="cpu", dtype="fp32")
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(24):  # greedy by hand
            ids = torch.cat([ids, model.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = ids[0, len(model.tokenizer(PROMPT).input_ids) :].tolist()
    new = new[: new.index(0)] if 0 in new else new
    expected = model.tokenizer.decode(new, skip_special_tokens=True)
    assert expected
    assert answer(with_settings(tiny_llama, tmp_path / "base", **settings)) == expected


@pytest.mark.parametrize("end", [10**30, 512, -7, [0, 99_999]])
def test_an_end_token_that_the_model_does_not_have_is_refused(end, tiny_llama, tmp_path):
    base = with_settings(tiny_llama, tmp_path / "base", eos_token_id=end)
    with pytest.raises(LoraError, match=r"end token|eos_token_id") as error:
        answer(base)
    assert "generation_config.json" in str(error.value)
    with_settings(tiny_llama, tmp_path / "mended", eos_token_id=0)  # the fix
    answer(tmp_path / "mended")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_a_model_of_nan_or_infinity_writes_no_text(number, temperature, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][:] = number
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        answer(base, temperature=temperature)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_every_command_that_computes(tiny_gpt2, tmp_path):
    """As eval and generate met it, the embedding raised an IndexError of its own."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_gpt2, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"].append({"id": 600, "content": "river", **plain})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "the river is long"}])
    for run in (
        lambda: evaluate_model(str(folder), None, data, quantization="none"),
        lambda: generated(folder, "the river"),
    ):
        with pytest.raises(LoraError, match="token"):
            run()
    shutil.copy(tiny_gpt2 / "tokenizer.json", folder)  # the fix
    assert evaluate_model(str(folder), None, data, quantization="none")["base"].loss > 0


def generated(folder, prompt):
    opened = open_model(str(folder), None)
    config = generation_config(opened.model, opened.tokenizer, max_new_tokens=2)
    return complete(opened.model, opened.tokenizer, [prompt], config)


def test_a_prompt_beyond_the_models_positions_is_refused_and_an_answer_ends_at_the_last(tiny_gpt2):
    """GPT-2 has an embedding for each of 256 positions; the one behind them was an IndexError."""
    opened = open_model(str(tiny_gpt2), None, device="cpu", dtype="fp32")
    config = generation_config(opened.model, opened.tokenizer, max_new_tokens=400)
    config.eos_token_id = None
    (cut,) = complete(opened.model, opened.tokenizer, [PROMPT], config)
    assert cut.text
    assert cut.stop is None
    with pytest.raises(LoraError, match=r"the prompt has .* tokens, but the model sees 256 at most"):
        complete(opened.model, opened.tokenizer, [PROMPT * 200], config)
