"""The LoRA paper's questions on a small model: which matrices, under a fixed number of parameters? Which rank?

    python benchmarks/science.py FOLDER [--tasks sql faq] [--studies rank matrices curve]

SmolLM2-135M-Instruct in bf16, 20 steps a training, seeds 0, 1, 2. sql: the demo's text-to-SQL, held-out rows about
other databases. faq: 50 facts about made-up products in two wordings, held out in a third one (benchmarks/faq.py).
curve: a model of 5 million parameters, trained from nothing (benchmarks/small_model.py), in fp32, ranks 1 to 128 of all
linear layers, 200 steps: long enough that a rank can be too small.
Each study is a `lora sweep` in FOLDER, whose command is printed; a study that was stopped goes on. Each ends with a
table for Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
STUDIES = {  # what is varied, on the recipe below
    "rank": ["--vary", "adapter.rank=1,4,16,64", "--set", "adapter.projections=[q,v]"],
    "matrices": ["--vary", "adapter.projections=[q],[k],[v],[o],[q,k],[q,v],[q,k,v,o]", "--same-parameters"],
    "curve": ["--vary", "adapter.rank=1,2,4,8,16,32,64,128", "--set", "dtype=fp32", "--set", "train.max_steps=200"],
}
ALL_LINEAR = {"rank": 8, "alpha": 32, "target_modules": "all-linear"}
RECIPE: dict[str, Any] = {
    "base_model": str(MODEL),
    "quantization": "none",
    "dtype": "bf16",
    "adapter": {"rank": 8, "alpha": 16, "projections": ["q"]},  # 276,480 parameters, which `matrices` keeps
    "train": {"max_steps": 20, "epochs": 100, "gradient_accumulation_steps": 1, "learning_rate": 2e-3}
    | {"schedule": "linear", "keep_checkpoints": 1},
    "output": "unused",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sql", "faq"])
    parser.add_argument("--studies", nargs="+", default=[*STUDIES])
    given = parser.parse_args()
    from real_model import make_real_model

    make_real_model(MODEL, ROOT / "build" / "downloads")
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "general.txt").write_text("The house stood at the end of the road. " * 12, encoding="utf-8")
    for study in given.studies:
        for task in given.tasks:
            recipe, out = make_recipe(task, given.folder, study), given.folder / f"{task}-{study}"
            words = ["sweep", recipe, *STUDIES[study], "--seeds", "3", "--output", out]
            print("lora", *words, flush=True)
            subprocess.run([sys.executable, "-m", "lora_cli", *map(str, words)], check=False)
            print_table(out / "sweep.json")
            if study == "curve":
                print_training(out / "sweep.json")


def make_recipe(task: str, folder: Path, study: str) -> Path:
    """The recipe, written beside its rows."""
    own: dict[str, Any] = {}
    if study == "curve":
        own = {"base_model": str(folder / "small"), "adapter": ALL_LINEAR}
        if not (folder / "small").exists():
            from small_model import make_small_model

            make_small_model(folder / "small")
    train, held_out = sql_rows() if task == "sql" else faq_rows()
    data: dict[str, Any] = {"max_seq_len": 128, "packing": False, "general_text": "general.txt"}
    for name, rows in {"train": train, "validation": held_out}.items():
        path = folder / f"{task}-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data[name] = path.name
    file = folder / ("curve-" * (study == "curve") + f"{task}.yaml")
    train_settings = RECIPE["train"] | {"micro_batch_size": 4 if task == "sql" else 8}  # about 190 tokens a step
    file.write_text(
        json.dumps(RECIPE | {"data": data, "train": train_settings} | own, indent=2) + "\n", encoding="utf-8"
    )  # JSON is YAML
    return file


def sql_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    from text_to_sql import make_rows

    return make_rows(400, 0, held_out=False), make_rows(40, 0, held_out=True)


def faq_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    from faq import FACTS, PRODUCTS

    train, held_out = [], []
    for value, wordings, other, answer in FACTS.values():
        for number, product in enumerate(PRODUCTS):
            completion = " " + answer.format(product, value(number))
            train += [{"prompt": each.format(product), "completion": completion} for each in wordings]
            held_out.append({"prompt": other.format(product), "completion": completion})
    return train, held_out


def print_table(path: Path) -> None:
    """Rows of a table in Markdown."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for each in found["points"]:
        values = " ".join(f"{key} {json.dumps(value)}" for key, value in each["settings"].items())
        if "loss" not in each:
            print(f"| {values} | {each['state']} |")
            continue
        behind = each["behind"]
        half = ((behind["high"] or 0) - (behind["low"] or 0)) / 2
        seeds = ", ".join(f"{loss:.3f}" for loss in each["seed_losses"])
        print(
            f"| {values} | {each['trained_parameters']:,} | {each['loss']:.4f} | {seeds} "
            f"| {behind['gain']:.4f} ± {half:.4f} |"
        )
    print(found["recommendation"], flush=True)


def print_training(path: Path) -> None:
    """Of each point's first run, the mean training loss of the first ten steps, of steps 41 to 50, of the last ten."""
    for each in json.loads(path.read_text(encoding="utf-8"))["points"]:
        lines = (Path(each["folders"][0]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        means = [sum(part) / len(part) for part in (losses[:10], losses[40:50], losses[-10:])]
        print(f"{each['name']}: {', '.join(f'{mean:.2f}' for mean in means)}", flush=True)


if __name__ == "__main__":
    main()
