"""Makes tiny random models with a real tokenizer, for the smoke recipe and the tests.

python scripts/tiny_model.py tests/data     remakes the model and the rows that ship in the repository
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from lora_cli.studies.tiny import make_tokenizer, save_tiny

__all__ = ["make_tokenizer", "save_tiny"]


def tiny_gpt2_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=512, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )


def smoke_rows() -> str:
    """The smoke recipe's data: 64 small sums in words, as JSON lines."""
    rng = random.Random(0)
    lines = []
    for _ in range(64):
        a, b = rng.randrange(10), rng.randrange(10)
        name = rng.choice(["ann", "bob", "cleo", "dan", "eve", "finn"])
        prompt = f"{name} has {a} apples and gets {b} more. How many?\n"
        lines.append(json.dumps({"prompt": prompt, "completion": f"{name} has {a + b} apples."}) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    import torch

    place = Path(sys.argv[1])
    save_tiny(tiny_gpt2_config(), place / "tiny-gpt2", dtype=torch.bfloat16)
    (place / "smoke.jsonl").write_text(smoke_rows(), encoding="utf-8")
