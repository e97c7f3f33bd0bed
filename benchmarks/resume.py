"""What it costs to be able to resume, and how long resuming takes.

    python benchmarks/resume.py [cost | time] [--steps N]

cost  SmolLM2-135M in NF4, the work of benchmarks/train.py: the time of a checkpoint over that of 50 steps
time  from the start of `lora train --resume` to its first step, against a run that begins; the step itself is left out,
      because the rows of another step are longer or shorter. The same of a tiny GPT-2 that resumes after step 10 and
      after step 2,000: it must not depend on the step
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_rows import ROOT, Work, prepare_work, recipe_of

from lora_cli.recipe import load_recipe, recipe_values

EVERY = 50
TINY = {
    "base_model": str(ROOT / "tests" / "data" / "tiny-gpt2"),
    "quantization": "none",
    "data": {"train": str(ROOT / "tests" / "data" / "smoke.jsonl"), "max_seq_len": 64},
    "train": {"epochs": 1000, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
}


def write_recipe(folder: Path, values: dict[str, Any], name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**values, "output": str(folder / name)}), encoding="utf-8")
    return path


def real_recipe(folder: Path, name: str, **train: Any) -> Path:
    """The instruction rows of benchmarks/train.py: up to 512 tokens, eight a step, rank 16 on q, k, v and o, NF4."""
    work = Work("long", 12, 8)
    prepare_work(work, folder)
    values = recipe_values(recipe_of(work, folder, name))
    values["dtype"] = "auto"
    values["train"] |= {"epochs": 1000, **train}
    return write_recipe(folder, values, name)


def cost(steps: int) -> None:
    """In one process, so that both times are of the same machine state."""
    from rich.console import Console

    from lora_cli.base.load import quiet_libraries
    from lora_cli.training.train import train
    from lora_cli.training.writer import RunWriter

    quiet_libraries()
    taken: list[float] = []
    own = RunWriter.checkpoint

    def timed(self: RunWriter, state: Any) -> None:
        began = time.monotonic()
        own(self, state)
        taken.append(time.monotonic() - began)

    RunWriter.checkpoint = timed
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = real_recipe(folder, "run", max_steps=steps, checkpoint_every=1)
        train(load_recipe(recipe), Console(stderr=True))
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        size = sum(path.stat().st_size for path in next((folder / "run" / "checkpoints").iterdir()).rglob("*"))
    step, checkpoint = statistics.median(line["seconds"] for line in lines[1:]), statistics.median(taken)
    print(f"a checkpoint of {size / 2**20:.0f} MiB: {checkpoint:.3f} s (median of {len(taken)}); a step: {step:.2f} s")
    print(f"one every {EVERY} steps: {checkpoint / (EVERY * step):.3%} of training time")


def first_step(recipe: Path, run: Path, *options: str) -> float:
    """Seconds from the start of the process to its first step, the step itself left out; then it is killed."""
    metrics = run / "metrics.jsonl"
    known = 0
    if options:  # a line of a step that was not kept would look like the first new one
        newest = max((run / "checkpoints").glob("step_*"))
        shutil.copyfile(newest / "metrics.jsonl", metrics)
        known = last_step(metrics)
    began = time.monotonic()
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None:
        if last_step(metrics) > known:
            seconds = time.monotonic() - began - json.loads(metrics.read_text().splitlines()[-1])["seconds"]
            process.kill()
            process.communicate()
            return seconds
        time.sleep(0.01)
    raise SystemExit(f"no step was made: {process.communicate()[1]}")


def last_step(metrics: Path) -> int:
    """By the end of the file alone: it may be long."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 2000))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError):
            continue
    return 0


def run_until(recipe: Path, step: int) -> None:
    """With a checkpoint after that step, as a signal leaves one."""
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = recipe.with_suffix("") / "metrics.jsonl"
    while process.poll() is None and last_step(metrics) < step:
        time.sleep(0.01)
    process.terminate()
    process.communicate()


def resuming(repeats: int = 3) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = real_recipe(folder, "real", max_steps=200)
        run = folder / "real"
        cold, warm = [], []
        run_until(recipe, 3)
        for _ in range(repeats):
            aside = folder / "aside"
            shutil.copytree(run / "prepared", aside / "prepared")
            run.rename(folder / "kept")
            aside.rename(run)
            cold.append(first_step(recipe, run))
            shutil.rmtree(run)
            (folder / "kept").rename(run)
            warm.append(first_step(recipe, run, "--resume"))
        a, b = statistics.median(cold), statistics.median(warm)
        print(f"SmolLM2-135M, to the first step: {a:.1f} s from the start, {b:.1f} s resumed ({b - a:+.1f} s)")
        times = []
        for step in (10, 2000):
            tiny = {**TINY, "train": {**TINY["train"], "max_steps": 3000}}
            recipe = write_recipe(folder, tiny, f"tiny{step}")
            run_until(recipe, step)
            each = [first_step(recipe, folder / f"tiny{step}", "--resume") for _ in range(repeats)]
            times.append(statistics.median(each))
        print(f"tiny GPT-2, resumed after step 10: {times[0]:.2f} s; after step 2,000: {times[1]:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", choices=["cost", "time"])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if options.section != "time":
        cost(options.steps)
    if options.section != "cost":
        resuming()


if __name__ == "__main__":
    main()
