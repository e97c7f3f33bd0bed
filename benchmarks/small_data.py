"""Rates, ranks and epochs for little data: what `lora init` writes beside other choices, on tasks that have answers.

    python benchmarks/small_data.py FOLDER [--tasks faq sql] [--variants init 2e-4 …] [--seeds 0 1]

faq    100 rows of questions and answers about made-up products, asked again in other words (benchmarks/faq.py)
sql    100 rows of the demo's text-to-SQL, scored by running 50 answers about databases that training never shows

The base is SmolLM2-135M-Instruct moved off its 4-bit grid (benchmarks/off_grid.py, spread 0.1). Each recipe is that of
`lora init --gpu 8GB` with a variant's settings. A run that is in FOLDER/results.jsonl is not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
SOURCE = ROOT / "build" / "smollm2-135m-instruct"
ROWS = 100
ASKED = 50
VARIANTS: dict[str, dict[str, float | str]] = {  # what is left out is as `lora init` writes it
    "init": {},
    "before": {"layers": "attention", "rank": 16, "rate": 2e-4, "epochs": 3},  # what recipes said before all of this
    "attention": {"layers": "attention"},
    "2e-4": {"rank": 16, "rate": 2e-4, "epochs": 3},
    "small steps": {"rank": 16, "rate": 1.8e-4, "epochs": 3},
    "rank 8": {"rank": 8, "rate": 2e-4, "epochs": 3},
    "rank 8, 5e-4": {"rank": 8, "rate": 5e-4, "epochs": 3},
    "rank 8, 1e-3": {"rank": 8, "rate": 1e-3, "epochs": 3},
    "six epochs": {"rank": 16, "rate": 1.7e-4, "epochs": 6},
    "ten epochs": {"rank": 8, "rate": 2e-4, "epochs": 10},
}
KEYS = {
    "layers": "adapter.target_modules",
    "rank": "adapter.rank",
    "rate": "train.learning_rate",
    "epochs": "train.epochs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["faq", "sql"])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    from off_grid import move_off_grid
    from real_model import make_real_model

    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    given.folder.mkdir(parents=True, exist_ok=True)
    base = given.folder / "model"
    if not base.exists():
        make_real_model(SOURCE, ROOT / "build" / "downloads")
        move_off_grid(SOURCE, base, spread=0.1)
    results = given.folder / "results.jsonl"
    for seed in given.seeds:
        for task in given.tasks:
            for variant in given.variants:
                place = (task, variant, seed)
                if place not in {(each["task"], each["variant"], each["seed"]) for each in known(results)}:
                    found = measure(given.folder, base, *place)
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                    print(json.dumps(found), flush=True)
    table(known(results))


def known(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def measure(folder: Path, base: Path, task: str, variant: str, seed: int) -> dict[str, Any]:
    from rich.console import Console

    from lora_cli.planning.first_recipe import write_first_recipe
    from lora_cli.recipe import load_recipe
    from lora_cli.training.train import train

    run = folder / f"{task}-{variant}-{seed}".replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    data, asked, held_out = make_data(task, run)
    path = run / "recipe.yaml"
    write_first_recipe(str(base), [str(data)], path, gpu="8GB")
    changes = [f"{KEYS[key]}={value}" for key, value in VARIANTS[variant].items()]
    changes += [f"train.seed={seed}", f"output={run / 'run'}", "train.checkpoint_minutes=null"]
    changes += [f"data.validation={held_out}"] * (held_out is not None)
    recipe = load_recipe(path, changes)
    report = train(recipe, Console(quiet=True))
    return {
        "task": task,
        "variant": variant,
        "seed": seed,
        "layers": recipe.adapter.target_modules,
        "rank": recipe.adapter.rank,
        "rate": recipe.train.learning_rate,
        "epochs": recipe.train.epochs,
        "steps": report["steps"],
        "trained": report["last_loss"],
        "base": report["base_validation_loss"],
        "held out": report["best_validation_loss"],
        "best step": report["best_step"],
        "forgotten": report["general_text"]["change"],
        "right": right(run / "run", asked),
        "seconds": report["seconds"],
    }


def make_data(task: str, run: Path) -> tuple[Path, list[dict[str, Any]], Path | None]:
    """File to train on; questions to ask, with their answers; rows held out, None: as the recipe has it."""
    if task == "faq":
        from faq import write

        write(run)
        return run / "faq.csv", _lines(run / "asked.jsonl"), None
    from text_to_sql import make_rows

    rows, held_out = make_rows(1200, 0, held_out=False), make_rows(100, 0, held_out=True)
    random.Random(0).shuffle(rows)
    for name, some in (("train", rows[:ROWS]), ("held-out", held_out[ASKED:])):
        text = "".join(json.dumps({key: row[key] for key in ("prompt", "completion")}) + "\n" for row in some)
        (run / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return run / "train.jsonl", held_out[:ASKED], run / "held-out.jsonl"


def right(run: Path, asked: list[dict[str, Any]]) -> float:
    """Share of the questions that the run's adapter answers rightly, greedily."""
    if "answer" in asked[0]:
        from faq import answered

        return answered(run, asked, base=False)[0] / len(asked)
    from text_to_sql import execution_accuracy

    from lora_cli.adapters.named import find_named
    from lora_cli.evaluation.generate import Speaker
    from lora_cli.evaluation.generation import complete

    speaker = Speaker(
        find_named(str(run)), through_template=False, default="raw", seed=0, sampling={"max_new_tokens": 48}
    )
    texts = [row["prompt"] for row in asked]
    found = complete(speaker.opened.model, speaker.opened.tokenizer, texts, speaker.config)
    return execution_accuracy(asked, [each.text for each in found])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(found: list[dict[str, Any]]) -> None:
    print("\n| task | rank | rate | epochs | steps | seed | training loss | held-out loss | general text | right |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for each in sorted(found, key=lambda each: (each["task"], each["rank"], each["rate"], each["epochs"])):
        print(
            f"| {each['task']} ({each['variant']}) | {each['rank']} | {each['rate']:.1e} | {each['epochs']:g} "
            f"| {each['steps']} | {each['seed']} | {each['trained']:.3f} | {each['held out']:.3f} "
            f"| {each['forgotten']:+.2f} | {each['right']:.0%} |"
        )


if __name__ == "__main__":
    main()
