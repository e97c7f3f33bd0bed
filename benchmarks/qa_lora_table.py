"""LoRA, QLoRA and QA-LoRA side by side: trained, merged into 16 bits, and in 4 bits by each route.

    python benchmarks/qa_lora_table.py FOLDER [--models smollm2 small] [--tasks sql faq] [--seeds 0 1 2]

smollm2: SmolLM2-135M-Instruct moved off its 4-bit grid (benchmarks/off_grid.py, spread 0.1). small: trained from
nothing (benchmarks/small_model.py). sql: 160 rows of text-to-SQL, 24 held out about other databases. faq: 50 facts in
two wordings, held out in a third (benchmarks/faq.py). 30 steps, all linear layers, alpha twice the rank, rate 1e-3
(small: 2e-3), in fp32 on one thread. Each cell is a process and a file in FOLDER/cells, and is not made twice. Tokens a
second are of processor time, since other work on the machine does not change these. Ends with tables for Markdown: nats
a token of the answers, the mean of the seeds; paired 95 % intervals over rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
QLORA, QA_LORA, RANK = "QLoRA, NF4", "QA-LoRA, groups of 32", 16
EQUAL = "QLoRA, NF4, as few parameters"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, 16-bit": {"quantization": "none"},
    QLORA: {"quantization": "nf4"},
    EQUAL: {"quantization": "nf4"},
    QA_LORA: {"quantization": "int4", "group_size": 32},
    "QA-LoRA, groups of 64": {"quantization": "int4", "group_size": 64},
    "QA-LoRA, groups of 128": {"quantization": "int4", "group_size": 128},
}
BASES: dict[str, tuple[str, int]] = {
    "none": ("none", 32),
    "nf4": ("nf4", 32),
    "rounded": ("none", 32),
    **{f"int4 {size}": ("int4", size) for size in (32, 64, 128)},
}
ROUTES = {"rounding": "rounded", "int4's search": "int4 32", "NF4": "nf4"}
RATES = {"smollm2": 1e-3, "small": 2e-3}


def make_base(folder: Path, model: str) -> Path:
    from off_grid import move_off_grid
    from real_model import make_real_model
    from small_model import make_small_model

    base = folder / model
    if not base.exists():
        if model == "small":
            make_small_model(base)
        else:
            source = make_real_model(ROOT / "build" / "smollm2-135m-instruct", ROOT / "build" / "downloads")
            move_off_grid(source, base, spread=0.1)
    return base


def rows_of(task: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """To train on, and held out."""
    from science import faq_rows
    from text_to_sql import make_rows

    if task == "faq":
        return faq_rows()
    return make_rows(160, 1, held_out=False), make_rows(24, 0, held_out=True)


def rank_of(base: Path, method: str) -> int:
    """16, or of EQUAL the one that trains as many numbers as QA-LoRA with rank 16 and groups of 32 does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if method != EQUAL:
        return RANK
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    shapes = [each.weight.shape for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    return round(RANK * sum(out + width / 32 for out, width in shapes) / sum(out + width for out, width in shapes))


def make_cell(folder: Path, model: str, task: str, method: str, seed: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    base = folder / model
    train_rows, held_out = rows_of(task)
    if method in BASES:
        return {"losses": {"base": losses_of(base, method, held_out)}}
    place = folder / "runs" / f"{model}-{task}-{method}-{seed}".replace(" ", "-").replace(",", "")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    found = train_one(base, place, train_rows, method, seed, RATES[model], 1 if task == "sql" else 4)
    found["losses"] = merged_losses(place, base, method, held_out)
    shutil.rmtree(place)
    return found


def train_one(base: Path, place: Path, rows: list[dict[str, str]], method: str, seed: int, rate: float, each: int):
    from qa_lora import write_rows
    from rich.console import Console

    from lora_cli.recipe import load_recipe
    from lora_cli.training.train import train

    rank = rank_of(base, method)
    kind = "qa_lora" if method.startswith("QA") else "lora"
    recipe: dict[str, Any] = {"base_model": str(base), "dtype": "fp32", "output": str(place / "run")} | METHODS[method]
    recipe["adapter"] = {"method": kind, "target_modules": "all-linear", "rank": rank, "alpha": 2 * rank}
    recipe["data"] = {"train": str(write_rows(place / "train.jsonl", rows)), "max_seq_len": 512}
    recipe["train"] = {"max_steps": 30, "epochs": 100, "micro_batch_size": each, "gradient_accumulation_steps": 1}
    recipe["train"] |= {"learning_rate": rate, "seed": seed}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    of_the_wall, time.monotonic = time.monotonic, time.process_time  # one thread: other work on the machine counts not
    report = train(load_recipe(place / "recipe.yaml"), Console(quiet=True))
    time.monotonic = of_the_wall
    kept = {"trained_parameters", "tokens_per_second", "peak_memory_bytes", "steps", "last_loss"}
    return {key: report[key] for key in kept} | {"rank": rank}


def losses_of(model: Path | Any, kind: str, rows: list[dict[str, str]]) -> list[list[float]]:
    """Of a folder held in one of BASES: for each row the summed loss and the tokens of its answer."""
    import torch
    from qa_lora import loss_of, round_layers, rounded

    from lora_cli.base.load import load_model, load_tokenizer
    from lora_cli.base.source import find_base

    source, (how, size) = find_base(str(model)), BASES[kind]
    opened = load_model(source, quantization=how, dtype=torch.float32, device=torch.device("cpu"), group_size=size)
    if kind == "rounded":
        round_layers(opened, rounded)
    return loss_of(opened, load_tokenizer(source), rows).tolist()


def merged_losses(place: Path, base: Path, method: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    from qa_lora import loss_of

    from lora_cli.adapters.opened import open_model
    from lora_cli.merging.merge import merge

    opened = open_model(None, place / "run", device="cpu", dtype="fp32")
    found: dict[str, Any] = {"trained": loss_of(opened.model, opened.tokenizer, rows).tolist()}
    del opened
    if method.startswith("QA"):
        for name, dtype in (("4 bits: its own blocks", "fp32"), ("16-bit", "bf16")):
            merge(place / "run", place / dtype, dtype=dtype, onto="trained", proof="none")
            found[name] = losses_of(place / dtype, "none", rows)
        return found
    for onto in ("trained", "original") if method != "LoRA, 16-bit" else ("trained",):
        merge(place / "run", place / onto, dtype="bf16", onto=onto, proof="none")
        name = "" if onto == "trained" else " onto the 16-bit base"
        found[f"16-bit{name}"] = losses_of(place / onto, "none", rows)
        for route, kind in ROUTES.items():
            if onto == "original" or method == "LoRA, 16-bit":  # what QLoRA's users do, and what loses least
                found[f"4 bits: {route}"] = losses_of(place / onto, kind, rows)
    return found


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_cells(folder: Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    return {(each["model"], each["task"], each["method"], each["seed"]): each for each in found}


def difference(some: list[Any], others: list[Any]) -> tuple[float, float]:
    """Mean difference a token and half of its 95 % interval: (seeds, rows, loss and tokens); rows are clusters."""
    import torch

    one, other = (torch.tensor(each, dtype=torch.float64) for each in (some, others))
    tokens = one[0, :, 1]
    by_row = (one - other)[:, :, 0].mean(0)
    mean = by_row.sum() / tokens.sum()
    return mean.item(), 1.96 * ((by_row - mean * tokens).square().sum().sqrt() / tokens.sum()).item()


def print_tables(folder: Path) -> None:
    cells = read_cells(folder)
    for model, task in dict.fromkeys((model, task) for model, task, *_ in cells):
        bases = {
            name: each["losses"]["base"]
            for (m, t, name, _), each in cells.items()
            if (m, t) == (model, task) and name in BASES
        }
        print(f"\n{model}, {task}; without an adapter: ", end="")
        print(", ".join(f"{name} {total(each):.4f}" for name, each in bases.items()))
        print("| | parameters | tokens/s | peak memory | loss | kept of the effect | QA-LoRA's 4 bits are better by |")
        print("|---|---|---|---|---|---|---|")
        of_method = {name: [each for key, each in cells.items() if key[:3] == (model, task, name)] for name in METHODS}
        for name, seeds in of_method.items():
            if not seeds:
                continue
            held = METHODS[name]["quantization"]
            base = bases.get(f"int4 {METHODS[name]['group_size']}" if held == "int4" else held)
            for at, where in enumerate(seeds[0]["losses"]):
                losses = [each["losses"][where] for each in seeds]
                loss = sum(map(total, losses)) / len(losses)
                trained = sum(total(each["losses"]["trained"]) for each in seeds) / len(seeds)
                share = f"{(total(base) - loss) / (total(base) - trained):.1%}" if base else "base not measured"
                pairs = [
                    (each["losses"][where], other["losses"]["4 bits: its own blocks"])
                    for each in seeds
                    for other in of_method[QA_LORA]
                    if each["seed"] == other["seed"]
                ]
                mean, half = difference(*map(list, zip(*pairs, strict=True))) if pairs else (float("nan"),) * 2
                facts = (
                    [
                        f"{seeds[0]['trained_parameters']:,}",
                        f"{middle(seeds, 'tokens_per_second'):.0f}",
                        f"{middle(seeds, 'peak_memory_bytes') / 2**20:.0f} MiB",
                    ]
                    if at == 0
                    else [""] * 3
                )
                title = f"{name}, {len(seeds)} seeds: {where}" if at == 0 else where
                print(f"| {title} | {' | '.join(facts)} | {loss:.4f} | {share} | {mean:+.4f} ± {half:.4f} |")


def total(losses: list[list[float]]) -> float:
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def middle(seeds: list[dict[str, Any]], key: str) -> float:
    return sorted(each[key] for each in seeds)[len(seeds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["smollm2", "small"])
    parser.add_argument("--tasks", nargs="+", default=["sql", "faq"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*BASES, *METHODS])
    given = parser.parse_args()
    (given.folder / "cells").mkdir(parents=True, exist_ok=True)
    for model in given.models:
        make_base(given.folder, model)
    processes = multiprocessing.get_context("forkserver")  # which imports once
    processes.set_forkserver_preload(["lora_cli.training.train", "lora_cli.merging.merge"])
    for seed in given.seeds:
        for model in given.models:
            for task in given.tasks:
                for method in given.methods:
                    if (method in BASES and seed > 0) or (method.endswith("128") and model == "smollm2"):
                        continue  # a base has no seed; most layers of smollm2 have no whole groups of 128
                    if not cell_file(given.folder, model, task, method, seed).exists():
                        child = processes.Process(target=write_cell, args=(given.folder, model, task, method, seed))
                        child.start()
                        child.join()
                        assert child.exitcode == 0
    print_tables(given.folder)


def write_cell(folder: Path, model: str, task: str, method: str, seed: int) -> None:
    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    cell = {"model": model, "task": task, "method": method, "seed": seed}
    cell |= make_cell(folder, model, task, method, seed)
    path = cell_file(folder, model, task, method, seed)
    path.with_suffix(".part").write_text(json.dumps(cell))
    path.with_suffix(".part").rename(path)
    print(path.stem, {name: round(total(each), 4) for name, each in cell["losses"].items()}, flush=True)


def cell_file(folder: Path, *key: Any) -> Path:
    return folder / "cells" / ("-".join(map(str, key)).replace(" ", "-").replace(",", "") + ".json")


if __name__ == "__main__":
    main()
