"""E6: evaluation does not depend on batch size, order or packing; and it is what transformers computes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from conftest import read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import find_base
from lora_cli.data.batches import collate
from lora_cli.data.example import Example, windows
from lora_cli.data.prepare import prepare
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.evaluation.evaluate import evaluate_model, evaluate_run
from lora_cli.evaluation.perplexity import EvaluationStopped, example_losses
from lora_cli.merging.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.studies import equalities

CPU = torch.device("cpu")


def mean_loss(model: Any, examples: Any, lay_out: Any, max_tokens: int) -> tuple[float, int]:
    """(nats per target token, target tokens) of all examples together."""
    losses, targets = example_losses(model, examples, lay_out, max_tokens)
    return losses.sum().item() / int(targets.sum()), int(targets.sum())


def test_the_loss_of_each_example_is_the_one_it_has_alone_and_transformers_computes(
    adapted, tokenizer, recipe_file, tiny_llama
):
    """However batches are made. Against transformers' own loss with labels."""
    examples = list(prepare(load_recipe(recipe_file()), tokenizer, keep=True).train)
    assert len(examples) == 24
    assert equalities.laid_out(adapted, examples) <= 1e-6
    assert equalities.loss(adapted, adapted, examples) <= 1e-6
    losses, counts = example_losses(adapted, examples, partial(collate, packed=True, pad_id=0, device=CPU), 100)
    assert losses.dtype == torch.float64
    assert losses.std() > 1  # or a mistaken order would not be seen
    assert counts.tolist() == [example.targets for example in examples]


def test_a_weight_in_training_is_no_weight_in_evaluation(adapted):
    ids = list(range(20, 40))
    plain, weighted = ([Example(ids, [(3, 9, w), (12, 20, 1.0)]), Example(ids, [(0, 20, w)])] for w in (1.0, 0.25))
    lay_out = partial(collate, packed=False, pad_id=0, device=CPU)
    expected, count = example_losses(adapted, plain, lay_out, 64)
    losses, same = example_losses(adapted, weighted, lay_out, 64)
    assert torch.equal(losses, expected)
    assert same.tolist() == count.tolist() == [14, 19]


def test_shares_add_up_to_the_whole_in_as_many_forwards_each(adapted, tokenizer, recipe_file):
    examples = prepare(load_recipe(recipe_file()), tokenizer, keep=True).train[:7]
    lay_out = partial(collate, packed=True, pad_id=0, device=CPU)
    whole = example_losses(adapted, examples, lay_out, 1)  # one example a forward: seven batches
    for processes, forwards in [(2, 4), (3, 3), (10, 1)]:
        seen: list[int] = []

        def counted(chosen, seen=seen):
            seen.append(len(chosen))
            return lay_out(chosen)

        parts = [example_losses(adapted, examples, counted, 1, share=(each, processes)) for each in range(processes)]
        assert len(seen) == forwards * processes
        for total, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.stack(of_parts).sum(0), total)
            assert (torch.stack(of_parts) != 0).sum(0).tolist() == [1] * 7  # each by exactly one


def test_an_evaluation_can_be_stopped_between_forwards(adapted, tokenizer, recipe_file):
    examples = prepare(load_recipe(recipe_file()), tokenizer, keep=True).train
    answers = iter([False, False, True])
    forwards: list[int] = []
    hook = adapted.register_forward_pre_hook(lambda *_: forwards.append(1))
    lay_out = partial(collate, packed=True, pad_id=0, device=CPU)
    mean_loss(adapted, examples[:1], lay_out, 1)  # tries what the model does to its logits, once
    forwards.clear()
    adapted.train()
    with pytest.raises(EvaluationStopped):
        example_losses(adapted, examples, lay_out, 1, should_stop=lambda: next(answers))
    hook.remove()
    assert len(forwards) == 2
    assert adapted.training


def test_sliding_window_perplexity_is_the_one_of_a_plain_loop(tiny_llama, tmp_path):
    text = "the quick brown fox jumps over the lazy dog and counts to ten " * 12
    (tmp_path / "long.txt").write_text(text)
    scores = evaluate_model(str(tiny_llama), None, tmp_path / "long.txt", max_seq_len=64, stride=16, dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    nats, done = 0.0, 1  # the first token has nothing before it
    while done < len(ids):
        end = 64 if done == 1 else min(done + 16, len(ids))
        start = max(0, end - 64)
        with torch.no_grad():
            logp = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        nats -= sum(logp[at - 1 - start, ids[at]].item() for at in range(done, end))
        done = end
    expected = nats / (len(ids) - 1)
    base = scores["base"]
    assert base.target_tokens == len(ids) - 1
    assert base.loss == pytest.approx(expected, abs=1e-5)
    assert base.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    first = len(tokenizer.decode(ids[:1]).encode())
    assert base.bits_per_byte == pytest.approx(nats / math.log(2) / (len(text.encode()) - first), rel=1e-5)
    assert set(scores) == {"base"}


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(2, 40), st.integers(1, 40))
def test_windows_make_every_token_a_target_once(size, length, stride):
    example = Example(list(range(size)), [(0, size, 1.0)])
    pieces = windows(example, length, stride)
    targets = [token for piece in pieces for token, on in list(zip(piece.ids, piece.trained, strict=True))[1:] if on]
    assert targets == list(range(1, size))
    assert all(len(piece.ids) <= length for piece in pieces)


def test_base_and_adapter_are_scored_on_the_same_tokens(run_recipe):
    run, report = run_recipe(quantization="nf4", data={"validation": 0.25}, train={"max_steps": 6})
    scores = evaluate_run(run, None)
    assert scores["base"].target_tokens == scores["adapter"].target_tokens
    assert scores["base"].loss == pytest.approx(report["base_validation_loss"], abs=1e-5)
    assert scores["adapter"].loss == pytest.approx(report["best_validation_loss"], abs=1e-5)


def test_json_has_the_documented_keys(run_recipe, tmp_path):
    run, _ = run_recipe(data={"validation": 0.25})
    command = [sys.executable, "-m", "lora_cli", "eval", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    printed = json.loads(done.stdout)  # one document and nothing else
    assert set(printed) == {"base", "adapter", "gain", "low", "high"}
    assert set(printed["base"]) == {"loss", "perplexity", "bits_per_byte", "target_tokens"}


def test_bits_per_byte_counts_the_bytes_of_completions(tiny_llama, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "größe?", "completion": "drei Äpfel"}])
    score = evaluate_model(str(tiny_llama), None, data, dtype="fp32")["base"]
    assert score.bits_per_byte == pytest.approx(
        score.loss * score.target_tokens / math.log(2) / len("drei Äpfel".encode())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 64, "max_seq_len": 64}, "--stride 64 must be between 1 and 63"),
        ({"max_seq_len": 5000}, "above what the model can see"),
    ],
)
def test_windows_that_cannot_be_are_refused(tiny_llama, sums, arguments, message):
    with pytest.raises(LoraError, match=message):
        evaluate_model(str(tiny_llama), None, sums, **arguments)


def test_run_without_validation_data_asks_for_a_file(run_recipe, sums):
    run, _ = run_recipe()
    with pytest.raises(LoraError, match="no validation data"):
        evaluate_run(run, None)
    recipe = load_recipe(run / "recipe.yaml")
    prepared = prepare(recipe, load_tokenizer(find_base(recipe.base_model)), keep=True)
    expected = sum(example.targets for example in prepared.train)
    assert evaluate_run(run, sums)["adapter"].target_tokens == expected == prepared.summary.train.target_tokens


def test_reading_leaves_no_cache_behind(sums, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert len(read_rows(sums)) == 24
    assert not (tmp_path / "cache").exists()


def test_a_loss_that_is_no_number_is_no_score(adapted, tmp_path, tiny_llama):
    """Numbers that are finite and too large to compute with: a table with nan in it would look like a result."""
    for layer in trained_modules(adapted).values():
        layer.lora_B.data.fill_(3e38)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(adapted, folder, find_base(str(tiny_llama)), quantization="none", double_quantization=True)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "one and one is two"}])
    with pytest.raises(CheckFailed, match="the loss of the base model with the adapter is nan"):
        evaluate_model(None, folder, data, device="cpu")
    with pytest.raises(CheckFailed, match="base \\+ adapter produce NaN or infinity"):
        merge(folder, tmp_path / "merged", dtype="fp32")
    assert not (tmp_path / "merged").exists()
