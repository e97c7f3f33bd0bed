"""Exported files in llama.cpp itself: the same tokens, the same numbers, the same prompt."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import ROOT
from environments import environment

sys.path.insert(0, str(ROOT / "benchmarks"))
from export import general_pieces, perplexity_of
from in_llama_cpp import ask

from lora_cli.exporting.blocks import _copy_fields
from lora_cli.exporting.converter import PINS

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]  # the first time an environment is made
TEXTS = [
    "SELECT count(*) FROM singer WHERE age > 56;",
    "In 1984, 12.5 % of 3,000,000 were 007.",
    "  two spaces, a tab\tand\n\n\nthree lines",
    "🙂 emoji 👩‍👩‍👧 and flags 🇩🇪",
    "日本語の文章。中文。한국어",
    "def f(x: int) -> str:\n    return f'{x:>4}'\n",
    "naïve café Ünïcödé ß",
    "http://example.org/?a=1&b=[2]",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "The capital of France is",
]
CHAT = [{"role": "user", "content": "How many rows?"}, {"role": "assistant", "content": "Two."}]
CHAT += [{"role": "user", "content": "And now?"}]


@pytest.fixture(scope="module")
def python() -> Path:
    """With the converters and llama.cpp, over this environment's libraries."""
    found = environment("llama.cpp", "--no-deps", *PINS, "xllamacpp==2026.10.11549")
    site = next((found.parent.parent / "lib").glob("python*/site-packages"))
    (site / "below.pth").write_text(sysconfig.get_path("purelib"))
    return found


def lora(python: Path, *words: str | Path) -> str:
    done = subprocess.run(
        [python, "-m", "lora_cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def in_llama_cpp(python: Path, model: Path, adapter: Path | str = "") -> dict[str, Any]:
    return ask(python, model, adapter=str(adapter), texts=TEXTS, chat=CHAT)


def perplexity_beside(python: Path, file: Path, model: Any, tokenizer: Any) -> float:
    """Of 2,040 tokens, in llama.cpp over that of the model here."""
    pieces = general_pieces(tokenizer)
    losses = [each for piece in ask(python, file, sequences=pieces)["losses"] for each in piece]
    return math.exp(sum(losses) / len(losses)) / perplexity_of(model, pieces)


def in_fp32(source: Path, target: Path) -> Path:
    """The same file with every block written out as the numbers that it stands for."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    _copy_fields(gguf, reader, writer, "f16")
    for each in reader.tensors:
        writer.add_tensor(each.name, gguf.dequantize(each.data, each.tensor_type).reshape(each.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def largest_difference(model: Any, told: dict[str, Any]) -> float:
    """Of the log probabilities of the ten likeliest next tokens, over all texts."""
    worst = 0.0
    for tokens, likely in zip(told["tokens"], told["likely"], strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        worst = max(worst, *(abs(own[int(at)].item() - value) for at, value in likely.items()))
    return worst


def test_llama_cpp_computes_what_was_trained(python, real_model, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    settings: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "use_rslora": True}
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, **settings)
    model: Any = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.mul_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    adapter = ("--base", real_model, "--output")
    lora(python, "export", tmp_path / "adapter", "--to", "gguf-adapter", *adapter, tmp_path / "adapter.gguf")
    lora(python, "export", real_model, "--to", "gguf", "--type", "f32", "--output", tmp_path / "base.gguf")
    beside = in_llama_cpp(python, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    alone = in_llama_cpp(python, tmp_path / "base.gguf")
    assert largest_difference(model, beside) < 0.02
    assert largest_difference(model, alone) > 0.1, "the adapter does something"

    lora(python, "merge", tmp_path / "adapter", *adapter, tmp_path / "merged", "--dtype", "fp32")
    lora(python, "export", tmp_path / "merged", "--to", "gguf", "--type", "f16", "--output", tmp_path / "merged.gguf")
    merged = in_llama_cpp(python, tmp_path / "merged.gguf")
    assert largest_difference(model, merged) < 0.03  # weights and activations in fp16
    tokenizer: Any = AutoTokenizer.from_pretrained(real_model)
    assert perplexity_beside(python, tmp_path / "merged.gguf", model, tokenizer) == pytest.approx(1, abs=0.005)
    assert merged["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert merged["prompt"] == tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    said = lora(
        python, "export", tmp_path / "merged", "--to", "gguf", "--type", "q4_1", "--output", tmp_path / "q.gguf"
    )
    assert "rounding changes weights by" in said
    assert in_llama_cpp(python, tmp_path / "q.gguf")["tokens"] == merged["tokens"]


def test_a_qa_lora_run_is_in_llama_cpp_what_it_is_here(python, real_model, tmp_path):
    """The 4-bit file holds the trained blocks: in fp32 arithmetic its numbers are those of the merged model. With the
    blocks themselves llama.cpp also rounds activations to 8 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"{a} + 2 =", "completion": f" {a + 2}"} for a in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base_model": str(real_model), "quantization": "int4", "dtype": "fp32", "output": str(tmp_path / "run")}
    recipe |= {"adapter": {"method": "qa_lora", "rank": 4}, "data": {"train": str(tmp_path / "rows.jsonl")}}
    recipe |= {"train": {"max_steps": 4, "learning_rate": 3e-3, "micro_batch_size": 8}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    lora(python, "train", tmp_path / "recipe.yaml")
    said = lora(python, "export", tmp_path / "run", "--to", "gguf", "--output", tmp_path / "run.gguf")
    assert "q4_1" in said
    assert "rounding changes weights by 0.00%" in said
    told = in_llama_cpp(python, in_fp32(tmp_path / "run.gguf", tmp_path / "f32.gguf"))
    lora(python, "merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert largest_difference(merged, told) < 0.1  # keys and values are in fp16 there
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert perplexity_beside(python, tmp_path / "f32.gguf", merged, tokenizer) == pytest.approx(1, abs=0.005)
    assert in_llama_cpp(python, tmp_path / "run.gguf")["tokens"] == told["tokens"]


def test_the_selftest_measures_llama_cpp_where_it_is(python):
    words = [python, "-c", "from lora_cli.studies import selftest as s; s.EQUALITIES = [e for e in s.EQUALITIES if "]
    words[2] += "e.name == 'E14']; print(s.lines(s.selftest(None, __import__('contextlib').nullcontext))[-1])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("holds"), done.stderr[-3000:]
