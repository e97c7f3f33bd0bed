"""What `lora sweep` costs over its trainings one by one: six ranks on SmolLM2-135M in NF4 with the demo's rows.

    python benchmarks/sweep.py FOLDER

Needs `make demo` before it. Each training by itself is a process of `lora train` with the data prepared already; the
adapters of both ways must be the same, byte for byte.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"
RANKS = (1, 2, 4, 8, 16, 32)
RECIPE = f"""
base_model: {BUILD / "smollm2-135m-instruct"}
data: {{train: {BUILD / "text-to-sql" / "validation.jsonl"}, validation: 0.16}}
train: {{max_steps: 6, micro_batch_size: 2, gradient_accumulation_steps: 2, eval_every: 6}}
output: unused
"""


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lora_cli", *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    values = ",".join(map(str, RANKS))
    together = seconds("sweep", str(recipe), "--vary", f"adapter.rank={values}", "--output", str(folder / "sweep"))
    alone = 0.0
    for rank in RANKS:
        output = folder / f"rank-{rank}"
        settings = (f"adapter.rank={rank}", f"output={output}", f"data.cache={folder / 'sweep' / 'prepared'}")
        alone += seconds("train", str(recipe), *(word for each in settings for word in ("--set", each)))
        one, other = (
            place / "adapter" / "adapter_model.safetensors" for place in (output, folder / "sweep" / output.name)
        )
        if one.read_bytes() != other.read_bytes():
            raise SystemExit(f"rank {rank}: the sweep's adapter is another")
    print(f"sweep {together:.0f} s, one by one {alone:.0f} s: {together / alone:.2f} ×; the same adapters")


if __name__ == "__main__":
    main()
