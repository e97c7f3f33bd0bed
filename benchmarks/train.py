"""Training side by side with peers: the same model, rows, order, rank and rate; each side in a process of its own.

    python benchmarks/train.py [SECTION ...] [--steps N] [--json FILE]      all sections without a name

trl                TRL + PEFT on instruction rows of 64 to 500 tokens, 8 a step
trl-checkpointing  the same with gradient checkpointing on both sides
peft-dense         a plain loop over PEFT on rows of exactly 512 tokens: nothing to gain from padding
curves             loss over 60 steps against TRL + PEFT, in fp32 and in bf16, from the same initial A; TRL once with A
                   and B in fp32, which is the same mathematics, and once as it ships, which rounds them to bf16
                   (curves-fp32, curves-bf16: one of the two)
picture            draws docs/pictures/train_vs_peers.png from --json FILE; after all sections also by itself

Work: SmolLM2-135M-Instruct in NF4 with double quantization, rank 16 on q, k, v and o, no dropout, AdamW at a constant
2e-4, clipping at 1.0, bf16 (--dtype fp32 for the other). Rows are functions of Python's standard library.
Real tokens are those of the rows, padding not counted. Speed is the median over steps 2 to N of a step's real tokens by
the time from the end of the step before it to its own end. Peak memory is the largest resident size (VmHWM).
--json keeps the sections of an earlier run that this one does not repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import train_peers as peers
from train_rows import MODEL, ROOT, Work, prepare_work, recipe_of, steps_of

PICTURE = ROOT / "docs" / "pictures" / "train_vs_peers.png"


def ours(folder: Path, work: Work) -> dict[str, Any]:
    from rich.console import Console

    from lora_cli.base.load import quiet_libraries
    from lora_cli.training import loop
    from lora_cli.training.train import train

    stamps: list[float] = []
    one_step = loop.Run._one_step

    def stamped(*arguments: Any) -> None:
        one_step(*arguments)
        stamps.append(time.monotonic())

    quiet_libraries()
    with patch.object(loop.Run, "_one_step", stamped):
        train(recipe_of(work, folder, "run"), Console(stderr=True))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {"losses": "loss", "tokens": "tokens", "targets": "target_tokens"}
    return {name: [line[key] for line in lines] for name, key in names.items()} | {"stamps": stamps}


@dataclass(frozen=True)
class Side:
    label: str
    train: Callable[[Path, Work], dict[str, Any]]
    same_order: bool = True


SIDES = {
    "lora": Side("lora", ours),
    "trl": Side("TRL + PEFT", peers.trl),
    "trl-by-length": Side("TRL + PEFT, by length", peers.trl_by_length, same_order=False),
    "trl-fp32-adapter": Side("TRL + PEFT, A, B in fp32", peers.trl_fp32_adapter),
    "peft": Side("PEFT loop", peers.peft),
    "unsloth": Side("unsloth", peers.unsloth),
}


@dataclass(frozen=True)
class Section:
    title: str
    sides: tuple[str, ...]
    work: Work


LONG, SHORT = Work("long", 12, 8), Work("short", 60, 4, max_tokens=128)
CURVES = ("lora", "trl-fp32-adapter", "trl", "peft")
SECTIONS = {
    "trl": Section("instruction rows", ("lora", "trl", "trl-by-length"), LONG),
    "trl-checkpointing": Section("checkpointed", ("lora", "trl"), replace(LONG, checkpointing=True)),
    "peft-dense": Section("rows of 512 tokens", ("lora", "peft"), replace(LONG, rows="dense")),
    "curves-fp32": Section("loss in fp32", CURVES, replace(SHORT, dtype="fp32")),
    "curves-bf16": Section("loss in bf16", CURVES, SHORT),
}
SPEED = ("trl", "trl-checkpointing", "peft-dense")  # what the picture shows
GROUPS = {"curves": ("curves-fp32", "curves-bf16")}
NAMES = (*SPEED, "curves", "picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, help="steps of each side, at least 2 (12; curves 60)")
    parser.add_argument("--rows", type=int, help="rows a step (8; curves 4)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of all sections but curves")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return one_side(arguments.side, arguments.folder)
    if arguments.steps is not None and arguments.steps < 2:
        parser.error("--steps: 2 or more; the first one is not measured")
    if unknown := sorted(set(arguments.sections) - {*NAMES, *SECTIONS}):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(dict.fromkeys((*NAMES, *SECTIONS)))}")
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    wanted = arguments.sections or NAMES
    for name in [each for group in wanted if group != "picture" for each in GROUPS.get(group, (group,))]:
        work = SECTIONS[name].work
        work = replace(work, steps=arguments.steps or work.steps, rows_per_step=arguments.rows or work.rows_per_step)
        if arguments.dtype and not name.startswith("curves"):
            work = replace(work, dtype=arguments.dtype)
        results[name] = compare(name, work)
        show(name, results[name])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if "picture" in wanted:
        picture(results, arguments.picture)


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────


def compare(name: str, work: Work) -> dict[str, Any]:
    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    sys.path.insert(0, str(ROOT / "scripts"))
    with tempfile.TemporaryDirectory() as place:
        work = replace(work, model=str(real_model()))
        prepare_work(work, Path(place))
        results = {side: measure(side, Path(place)) for side in SECTIONS[name].sides}
    return {"steps": work.steps, "rows_per_step": work.rows_per_step, "dtype": work.dtype, "sides": results}


def real_model() -> Path:
    from real_model import make_real_model

    return make_real_model(MODEL, ROOT / "build" / "downloads")


def measure(name: str, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """What a side did, in a process of its own; or {"failed": why}: the others still count. seconds: at most."""
    side = SIDES[name]
    print(f"  {side.label}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    with (folder / f"{name}.log").open("w+") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=environment, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"it was not done after {seconds:.0f} seconds"}
        log.seek(0)
        said = log.read()
    if code:
        return why_failed(code, said)
    return summary(json.loads((folder / f"{name}.json").read_text()), folder, side)


def why_failed(code: int, said: str) -> dict[str, Any]:
    """What a process said last that is not indented, as a fix is; first of all whether memory ran out."""
    lines = [line for line in said.splitlines() if line.strip()] or [f"it ended with {code} and said nothing"]
    last = next((line for line in reversed(lines) if not line[0].isspace()), lines[-1].strip())
    if code == -signal.SIGKILL:
        last = f"does not fit: the system ended it, as where host memory runs out; it last said: {last}"
    elif re.search("out of memory|does not fit|not enough memory", last, re.IGNORECASE):
        last = f"does not fit: {last}"
    return {"failed": last, "log": lines[-40:]}


def one_side(name: str, folder: Path) -> None:
    work = Work.read(folder)
    if work.device == "cuda":
        cap_memory(work.most_gib)
    result = SIDES[name].train(folder, work)
    (folder / f"{name}.json").write_text(json.dumps(result | {"peak_memory_bytes": peak_memory_bytes(work.device)}))


def cap_memory(gib: float | None) -> None:
    """Let this process take no more of the GPU, and see no more of it: lora plans with what the driver calls free."""
    import torch

    if gib is not None:
        most, ask = int(gib * 2**30), torch.cuda.mem_get_info

        def capped(*device: Any) -> tuple[int, int]:
            free, total = ask(*device)
            return min(free, most - torch.cuda.memory_reserved()), total

        torch.cuda.set_per_process_memory_fraction(min(1.0, most / ask()[1]))
        torch.cuda.mem_get_info = capped


def peak_memory_bytes(device: str) -> int:
    """What torch took of a GPU; of a CPU this process alone, while ru_maxrss begins with what its parent held."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def summary(result: dict[str, Any], folder: Path, side: Side) -> dict[str, Any]:
    """Speed and totals of a result; a side that trained other tokens than were given is refused."""
    expected = [(sum(len(row["ids"]) for row in rows), sum(targets(row) for row in rows)) for rows in steps_of(folder)]
    seen = list(zip(result["tokens"], result["targets"], strict=True))
    if not side.same_order:
        expected, seen = [tuple(map(sum, zip(*each, strict=True))) for each in (expected, seen)]
    if seen != expected:
        return {"failed": f"it trained other tokens: (real, target) {seen} instead of {expected}"}
    stamps = result.pop("stamps")
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    speeds = [tokens / each for tokens, each in zip(result["tokens"][1:], seconds, strict=True)]
    return result | {
        "seconds": seconds,  # of steps 2 to N
        "tokens_per_second": statistics.median(speeds),
        "steps_per_second": len(seconds) / sum(seconds),
        "all_tokens": sum(result["tokens"]),
        "all_targets": sum(result["targets"]),
        "last_loss": result["losses"][-1],
    }


def targets(row: dict[str, Any]) -> int:
    return len(row["ids"]) - row["prompt"]


# ── showing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def show(name: str, result: dict[str, Any]) -> None:
    sides = {side: each for side, each in result["sides"].items() if "failed" not in each}
    first, steps = SECTIONS[name].sides[0], result["steps"]
    print(f"\n{name}: {steps} steps of {result['rows_per_step']} rows, {result['dtype']}")
    print(" " * 24 + "".join(f"{SIDES[side].label:>28}" for side in sides))
    lines: list[tuple[str, str, float, int]] = [
        ("real tokens/s", "tokens_per_second", 1, 0),
        ("steps/s", "steps_per_second", 1, 3),
        ("peak memory, GiB", "peak_memory_bytes", 2**30, 2),
        (f"loss at step {steps}", "last_loss", 1, 4),
        ("real tokens", "all_tokens", 1, 0),
        ("target tokens", "all_targets", 1, 0),
    ]
    for title, key, unit, digits in lines:
        values = {side: each[key] / unit for side, each in sides.items()}
        cells = [f"{values[side]:.{digits}f}" if side in values else "" for side in sides]
        if first in values and digits in (0, 3, 2) and not key.startswith("all"):
            ratios = {side: values[first] / values[side] for side in values if side != first}
            cells = [
                f"{cell}  (lora {ratios[side]:.2f} ×)" if side in ratios else cell
                for side, cell in zip(sides, cells, strict=True)
            ]
        print(f"{title:24}" + "".join(f"{cell:>28}" for cell in cells))
    for side, each in sides.items():
        if side != first and first in sides and SIDES[side].same_order:
            gap, step = largest_gap(sides[first]["losses"], each["losses"])
            print(f"largest difference of the loss to {SIDES[side].label}: {gap:.3%}, at step {step}")
    for side, each in result["sides"].items():
        if "failed" in each:
            print(f"{SIDES[side].label} did not run to its end: {each['failed']}")
    sys.stdout.flush()


def largest_gap(ours: list[float], theirs: list[float]) -> tuple[float, int]:
    """(relative difference, step) where two curves are farthest apart. Steps that were not logged do not count."""
    return max((abs(a - b) / b, step) for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1))


def picture(results: dict[str, Any], place: Path) -> None:
    """Speed and peak memory of each side, one group of bars a section."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")

    bars: list[tuple[str, dict[str, Any]]] = []  # (label, result), from the top; an empty result is a heading
    for name in SPEED:
        sides = results.get(name, {}).get("sides", {})
        ran = [(SIDES[side].label, each) for side, each in sides.items() if "failed" not in each]
        bars += [(SECTIONS[name].title, {}), *ran] if len(ran) > 1 else []
    if not bars:
        raise SystemExit("nothing to draw: give --json FILE with results of " + ", ".join(SPEED))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.3 * len(bars) + 0.9), sharey=True, layout="constrained")
    wanted = (
        ("real tokens a second", "tokens_per_second", 1, ".0f"),
        ("peak memory, GiB", "peak_memory_bytes", 2**30, ".1f"),
    )
    for panel, (title, key, unit, form) in zip(panels, wanted, strict=True):
        values = [each.get(key, 0) / unit for _, each in bars]
        colors = ["#1f6feb" if label.startswith("lora") else "#b6bec9" for label, _ in bars]
        panel.barh(range(len(bars)), values, color=colors, height=0.72)
        for at, (value, (_, each)) in enumerate(zip(values, bars, strict=True)):
            if each:
                panel.text(value, at, f" {value:{form}}", va="center", fontsize=9)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlim(0, 1.15 * max(values))
        panel.set_ylim(len(bars) - 0.4, -0.6)  # the first section on top
        panel.set_xticks([])
        panel.tick_params(length=0)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=9)
    for text, (_, each) in zip(panels[0].get_yticklabels(), bars, strict=True):
        text.set_fontweight("normal" if each else "bold")
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=150)
    print(f"picture in {place}")


if __name__ == "__main__":
    main()
