"""Draws what two studies found, for docs/qa-lora.md and docs/science.md.

python benchmarks/study_pictures.py groups FOLDER     of benchmarks/qa_lora_table.py
python benchmarks/study_pictures.py science FOLDER    of benchmarks/science.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from qa_lora_table import METHODS, QA_LORA, difference, read_cells
from step_pictures import BLUE, GREY, PICTURES

TASKS = {"sql": "text-to-SQL", "faq": "facts"}
MARKS = {"sql": (BLUE, "o"), "faq": ("#57606a", "s")}


def groups(folder: Path) -> None:
    """How far the 4-bit file of larger groups is above that of groups of 32, with paired 95 % intervals over rows."""
    cells = read_cells(folder)
    models = list(dict.fromkeys(model for model, *_ in cells))
    figure, panels = pyplot.subplots(1, len(models), figsize=(8, 3), layout="constrained", sharey=True, squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for shift, (task, (color, mark)) in zip((-0.06, 0.06), MARKS.items(), strict=True):
            places, means, halves = [0.0], [0.0], [0.0]
            for at, name in enumerate([each for each in METHODS if each.startswith("QA-LoRA")]):
                of = {
                    (method, seed): each["losses"]["4 bits: its own blocks"]
                    for (m, t, method, seed), each in cells.items()
                    if (m, t) == (model, task) and method in (name, QA_LORA)
                }
                seeds = sorted(seed for method, seed in of if method == name and (QA_LORA, seed) in of)
                if at == 0 or not seeds:
                    continue
                mean, half = difference([of[name, each] for each in seeds], [of[QA_LORA, each] for each in seeds])
                places.append(at + shift)
                means.append(mean)
                halves.append(half)
            panel.errorbar(places, means, yerr=halves, color=color, marker=mark, capsize=4, linewidth=1.4)
            panel.plot([], [], color=color, marker=mark, label=TASKS[task])
        panel.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        panel.set_xticks([0, 1, 2], ["32", "64", "128"], fontsize=9)
        panel.set_xlim(-0.3, 2.3)
        panel.set_xlabel("weights of a group", fontsize=9)
        title = {"smollm2": "SmolLM2-135M", "small": "small, from nothing"}[model]
        panel.set_title(title, fontsize=10, loc="left")
        tidy(panel)
    panels[0][0].set_ylabel("loss above groups of 32, nats a token", fontsize=9)
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(PICTURES / "qa_lora_groups.png", dpi=150)


def science(folder: Path) -> None:
    """Losses above the best point's, with paired 95 % intervals over rows: table 5 and table 6 of the LoRA paper."""
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for panel, study in zip(panels, ("matrices", "rank", "curve"), strict=True):
        for task, (color, mark) in MARKS.items():
            path = folder / f"{task}-{study}" / "sweep.json"
            found = json.loads(path.read_text(encoding="utf-8"))["points"] if path.exists() else []
            points = [each for each in found if "behind" in each]
            behind = [each["behind"] for each in points]
            halves = [((each["high"] or 0) - (each["low"] or 0)) / 2 for each in behind]
            values = [each["gain"] for each in behind]
            shift = 0.06 if task == "faq" else -0.06
            panel.errorbar(
                [at + shift for at in range(len(points))],
                values,
                yerr=halves,
                color=color,
                marker=mark,
                capsize=4,
                linestyle="none",
                label=TASKS[task],
            )
            panel.set_xticks(range(len(points)), [named(each["settings"]) for each in points], fontsize=9)
        panel.set_title(
            {
                "matrices": "which matrices, equal numbers trained",
                "rank": "rank of q and v",
                "curve": "rank of all layers, small model, 200 steps",
            }[study],
            fontsize=10,
            loc="left",
        )
        tidy(panel)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    panels[0].set_ylabel("loss above the best, nats a token", fontsize=9)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(PICTURES / "science.png", dpi=150)


def named(settings: dict[str, Any]) -> str:
    value = settings.get("adapter.projections", settings.get("adapter.rank"))
    return ",".join(value) if isinstance(value, list) else str(value)


def tidy(panel: Any) -> None:
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["groups", "science"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    {"groups": groups, "science": science}[given.study](given.folder)
