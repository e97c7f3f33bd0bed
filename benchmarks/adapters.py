"""Commands on adapters, with adapters of rank 64 on all linear layers of a 7B model (synthetic).

    python benchmarks/adapters.py [--layers 32] [--rank 64]

Each command is a process of its own, so its time is that of a person who waits, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def write_adapter(folder: Path, layers: int, rank: int, seed: int) -> int:
    """An adapter as PEFT writes it, in fp32, with falling singular values; returns its bytes."""
    import torch
    from safetensors.torch import save_file

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
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
