"""The same recipe on one process, on several, and with its base in shares: how far apart are the losses?

    python benchmarks/processes.py [tiny|smollm2] [--steps 50] [--quantization none|nf4] [--processes 2]

fp32, dropout on, the same rows in every step. Printed: the largest difference of a step's loss to one process, seconds
of the median step, and the frozen weights that each process holds. `smollm2` needs build/smollm2-135m-instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
MODELS = {"tiny": ROOT / "tests" / "data" / "tiny-gpt2", "smollm2": ROOT / "build" / "smollm2-135m-instruct"}


def rows() -> list[dict[str, str]]:
    """800 sums of varied length; a later step never repeats an earlier one."""
    return [
        {"prompt": f"What is {a} plus {b}?{' Think.' * (a % 5)}\n", "completion": f"{a} plus {b} is {a + b}."}
        for a, b in ((i % 37, (7 * i) % 101) for i in range(800))
    ]


def run(folder: Path, recipe: dict, processes: int) -> tuple[list[dict], str]:
    """Lines of metrics.jsonl, and what was said."""
    path = folder / f"{Path(recipe['output']).name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", "lora_cli", "train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    lines = (Path(recipe["output"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        several = chosen.processes
        sides = {"one process": (1, False), f"{several} processes": (several, False), "in shares": (several, True)}
        alone: list[float] = []
        for name, (processes, shared) in sides.items():
            recipe = {
                "base_model": str(MODELS[chosen.model]),
                "quantization": chosen.quantization,
                "dtype": "fp32",
                "device": "cpu",
                "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
                "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": 128},
                "train": {"max_steps": chosen.steps, "epochs": 100, "micro_batch_size": 1, "shard_base": shared}
                | {"gradient_accumulation_steps": 4},
                "output": str(folder / name.replace(" ", "-")),
            }
            lines, said = run(folder, recipe, processes)
            losses = [line["loss"] for line in lines]
            alone = alone or losses
            apart = max(abs(a - b) for a, b in zip(alone, losses, strict=True))
            seconds = statistics.median(line["seconds"] for line in lines[1:])
            held = re.search(r"each of \d+ processes holds .*", said) or re.search(r"\S+ \S+ held$", said, re.M)
            print(
                f"{chosen.model}, {chosen.quantization}, {name}: {len(losses)} steps, loss {losses[0]:.4f} → "
                f"{losses[-1]:.4f}, largest difference to one process {apart:.1e}, {seconds:.2f} s a step; "
                f"{held[0] if held else '?'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
