"""Draws what benchmarks/limit.py measured, for docs/speed.md.

python benchmarks/limit.py --json limit.json && python benchmarks/step_pictures.py limit.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
BLUE, GREY = "#1f6feb", "#b6bec9"


def step_time(result: dict[str, Any], place: Path) -> None:
    """Shares of a step, the largest on top; matrix products, which nobody can leave out, in blue."""
    shares = result["parts"]
    figure, panel = pyplot.subplots(figsize=(8, 0.34 * len(shares) + 0.7), layout="constrained")
    names = list(shares)
    panel.barh(names, [100 * shares[n] for n in names], color=[BLUE if n == "matrix products" else GREY for n in names])
    for at, name in enumerate(names):
        panel.text(100 * shares[name], at, f" {shares[name]:.0%}", va="center", fontsize=9)
    panel.set_title(f"where the time of a step of {result['tokens']:,} tokens goes", fontsize=10, loc="left")
    panel.invert_yaxis()
    panel.set_xlim(0, 115 * max(shares.values()))
    bare(panel)
    figure.savefig(place, dpi=150)


def step_memory(tokens: dict[str, int], vocabulary: dict[str, int], place: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for panel, measured, title, label in (
        (panels[0], tokens, "memory beyond the weights", "tokens of a micro-batch"),
        (panels[1], vocabulary, "memory of the loss, 2,048 targets", "vocabulary"),
    ):
        sizes, held = [int(size) for size in measured], [each / 2**30 for each in measured.values()]
        panel.plot(sizes, held, color=BLUE, marker="o", markersize=4)
        panel.set_title(f"{title}, GiB", fontsize=10, loc="left")
        panel.set_xlabel(label, fontsize=9)
        panel.set_xticks(sizes[-3:], [f"{size:,}" for size in sizes[-3:]], fontsize=9)
        panel.set_ylim(0, 1.2 * max(held))
        panel.tick_params(labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=150)


def bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.tick_params(length=0, labelsize=9)
    panel.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what benchmarks/limit.py wrote")
    results = json.loads(parser.parse_args().json.read_text())
    step_time(results["step"], PICTURES / "step_time.png")
    step_memory(results["tokens"], results["vocabulary"], PICTURES / "step_memory.png")
