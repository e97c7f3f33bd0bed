"""Commands on adapters, with adapters of rank 64 on all linear layers of a 7B model (synthetic); and mixed batches.

    python benchmarks/adapters.py [--layers 32] [--rank 64]
    python benchmarks/adapters.py --mixed build/smollm2-135m-instruct

Each command is a process of its own, so its time is that of a person who waits, imports included. --mixed: 8 rows with
8 random adapters of rank 16 on all linear layers, in fp32, greedy: one batch, one row after the other, PEFT's batch.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lora_cli.adapters.file import read_adapter
from lora_cli.adapters.several import Several
from lora_cli.base.source import find_base

WIDTH, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def write_adapter(folder: Path, layers: int, rank: int, seed: int) -> int:
    """An adapter as PEFT writes it, in fp32, with falling singular values; returns its bytes."""
    draw, falling = torch.Generator().manual_seed(seed), torch.exp(-torch.arange(rank) / (rank / 4))
    tensors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in SHAPES.items():
            start = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{start}A.weight"] = torch.randn(rank, inputs, generator=draw)
            tensors[f"{start}B.weight"] = 0.01 * torch.randn(outputs, rank, generator=draw) * falling
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "owner/7b"}
    config |= {"target_modules": [name.rpartition(".")[2] for name in SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(each.nbytes for each in tensors.values())


def timed(*words: str | Path) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lora_cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shown = " ".join(str(each) for each in words if "/" not in str(each) and each != "--output")
    largest = after.ru_maxrss / 2**20  # GiB, of all processes so far
    print(f"lora {shown}: {took:.1f} s, {busy:.1f} s of a core; peak memory so far {largest:.2f} GiB", flush=True)


@torch.inference_mode()
def mixed(base: str, rows: int = 8, new: int = 32, rounds: int = 3) -> None:
    from peft import LoraConfig, get_peft_model

    folder, draw = Path(tempfile.mkdtemp(prefix="adapters-")), torch.Generator().manual_seed(0)
    names = [f"adapter-{row}" for row in range(rows)]
    peft: Any = get_peft_model(plain(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), names[0])
    for name in names[1:]:
        peft.add_adapter(name, peft.peft_config[names[0]])
    for key, each in peft.named_parameters():
        if "lora_" in key:
            each.copy_(torch.randn(each.shape, generator=draw) * 0.02)
    peft.save_pretrained(folder)
    peft.eval()
    model = plain(base)
    several = Several(model, find_base(base))
    several.add({name: read_adapter(folder / name) for name in names})
    ids = torch.randint(1000, 40000, (rows, 16), generator=draw)
    settings: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    each_row = [{name: 1.0} for name in names]

    def batch() -> torch.Tensor:
        several.use(each_row)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    def one_by_one() -> torch.Tensor:
        found = []
        for row, mix in zip(ids.split(1), each_row, strict=True):
            several.use([mix])
            found.append(model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings))
        return torch.cat(found)

    def of_peft() -> torch.Tensor:
        return peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **settings)

    best: dict[str, float] = {}
    for _ in range(rounds):
        for way in (batch, one_by_one, of_peft):
            began = time.perf_counter()
            way()
            best[way.__name__] = min(best.get(way.__name__, math.inf), time.perf_counter() - began)
    for name, seconds in best.items():
        print(f"{name}: {rows / seconds:.2f} rows a second, {best['one_by_one'] / seconds:.2f} times one by one")
    several.use(each_row)
    together, theirs = model(input_ids=ids).logits, peft(input_ids=ids, adapter_names=names).logits
    alone = []
    for row, mix in zip(ids.split(1), each_row, strict=True):
        began = time.perf_counter()
        several.use([mix])
        switch = time.perf_counter() - began
        alone.append(model(input_ids=row).logits)
    print(f"logits: {(together - torch.cat(alone)).abs().max():.1e} from one by one")
    print(f"logits: {(together - theirs).abs().max():.1e} from PEFT's; a switch: {1000 * switch:.2f} ms")


def plain(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--mixed", metavar="MODEL")
    options = parser.parse_args()
    if options.mixed is not None:
        mixed(options.mixed)
        return
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name, "one"), Path(name, "two")
        size = write_adapter(one, options.layers, options.rank, seed=0)
        write_adapter(two, options.layers, options.rank, seed=1)
        print(f"an adapter of {size / 2**20:.0f} MiB", flush=True)
        timed("inspect", one)
        timed("resize", one, "--rank", "16", "--output", Path(name, "small"))
        timed("combine", f"{one}:0.7", f"{two}:0.3", "--output", Path(name, "sum"))
        timed("combine", f"{one}:0.7", f"{two}:0.3", "--rank", "64", "--output", Path(name, "both"))


if __name__ == "__main__":
    main()
