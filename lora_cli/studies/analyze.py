"""`lora analyze`: the LoRA paper's section 7 for any adapters: whose directions they share, and what they amplify.

Source: Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_cli.adapters.low_rank import decomposed, largest
from lora_cli.base.source import find_base
from lora_cli.base.weight_files import stored_tensors
from lora_cli.errors import LoraError, refuse_if
from lora_cli.files import whole_output, write_json
from lora_cli.merging.files import require_place
from lora_cli.pages.render import render
from lora_cli.screen import say_on
from lora_cli.studies.inspect import DEAD, by_block, in_order, png, weight_beside
from lora_cli.studies.made import Part, open_part, require_one_base

RANDOM = "random"


@dataclass(frozen=True)
class Amplified:
    """Table 7 of one layer. rank: k, the directions of ΔW that are not dead.

    by_update, by_weight, by_random: ‖Uᵀ W V‖ with U and V the k largest singular directions of ΔW, of W, and random
    ones, of which it is the root of the mean square: ‖W‖ k / √(out · in).
    """

    layer: str
    rank: int
    update_norm: float
    weight_norm: float
    by_update: float
    by_weight: float
    by_random: float

    @property
    def amplification(self) -> float:
        """‖ΔW‖ / ‖Uᵀ W V‖: how much of what it strengthens was in W before."""
        return self.update_norm / self.by_update if self.by_update else math.inf


@dataclass(frozen=True)
class Similar:
    """φ(i, j) of one layer in two adapters, in row i - 1 and column j - 1: equation 4 of the paper, between 0 and 1.

    of_A: right-singular directions of A, as in the paper. of_update: those of ΔW, which know of B as well.
    inputs: their length; two random subspaces have max(i, j) / inputs.
    """

    layer: str
    of_A: np.ndarray
    of_update: np.ndarray
    inputs: int

    def numbers(self) -> dict[str, float]:
        """The first direction of each; the first of one in all of the other; all in all; and what chance gives."""
        found = {}
        for name, grid in (("A", self.of_A), ("update", self.of_update)):
            found |= {f"{name}_first": grid[0, 0], f"{name}_first_in_all": grid[0, -1], f"{name}_all": grid[-1, -1]}
        rows, columns = self.of_A.shape
        chance = {"first": 1, "first_in_all": columns, "all": max(rows, columns)}
        return {name: float(value) for name, value in found.items()} | {
            f"random_{name}": min(1.0, value / self.inputs) for name, value in chance.items()
        }


@dataclass(frozen=True)
class Analyzed:
    """names: of the adapters. amplified: by adapter. similar: by the names of two, of which the second may be random.

    missing: layers of which the base's checkpoint holds no tensor. notes: what a person should hear.
    """

    names: list[str]
    base: str
    amplified: dict[str, list[Amplified]]
    similar: dict[tuple[str, str], list[Similar]]
    missing: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For --json. grids: mean over the layers of a matrix, as far as all of them have ranks."""
        return {
            "adapters": self.names,
            "base": self.base,
            "amplification": {
                name: [asdict(each) | {"amplification": each.amplification} for each in layers]
                for name, layers in self.amplified.items()
            },
            "similarity": [
                {
                    "adapters": list(pair),
                    "layers": [{"layer": each.layer} | each.numbers() for each in layers],
                    "grids": {
                        matrix: {"A": _mean_grid(own, "of_A").tolist(), "update": _mean_grid(own, "of_update").tolist()}
                        for matrix, own in by_matrix(layers).items()
                    },
                }
                for pair, layers in self.similar.items()
            ],
            "weights_not_found": self.missing,
            "notes": self.notes,
        }


def by_matrix(layers: Sequence[Any]) -> dict[str, list[Any]]:
    """By the last part of the layers' names, such as q_proj."""
    found: dict[str, list[Any]] = {}
    for each in layers:
        found.setdefault(each.layer.rpartition(".")[2], []).append(each)
    return found


def _mean_grid(layers: Sequence[Similar], name: str) -> np.ndarray:
    grids = [getattr(each, name) for each in layers]
    rows, columns = (min(grid.shape[axis] for grid in grids) for axis in (0, 1))
    return np.mean([grid[:rows, :columns] for grid in grids], 0)


def similarity(one: Tensor, other: Tensor) -> np.ndarray:
    """φ(i, j) = ‖Vᵢ Wⱼᵀ‖² / min(i, j) of the first i and j rows, for all of them.

    one, other: (directions, inputs), orthonormal rows, from the largest down.
    """
    held = (one.double() @ other.double().T).square().cumsum(0).cumsum(1).numpy()
    return held / np.minimum(*np.ogrid[1 : len(one) + 1, 1 : len(other) + 1])


def amplified(layer: str, update: tuple[Tensor, Tensor, Tensor], W: Tensor, top: Tensor) -> Amplified | None:
    """update: U, s, Vᵀ of ΔW. W: (out, in) in fp32. top: its largest singular values, at least as many as ΔW has.

    None where ΔW is nothing.
    """
    U, values, V = update
    rank = int((values > DEAD * values[0]).sum())
    if not rank:
        return None
    within = U[:, :rank].float().T @ W @ V[:rank].float().T
    norm = torch.linalg.vector_norm(W).item()
    by_random = norm * rank / math.sqrt(W.numel())
    return Amplified(layer, rank, values.norm().item(), norm, within.norm().item(), top[:rank].norm().item(), by_random)


def analyze(sources: Sequence[str], output: Path | None, base: str | None = None) -> Analyzed:
    """Read adapters of one base, and its weights one at a time; what was found is written to a folder if one is named.

    Raises LoraError for adapters of different bases, and for those that are more than A and B of linear layers.
    """
    parts = _named([open_part(each, output) for each in sources])
    require_one_base(parts)
    apart = all(one.pairs.keys().isdisjoint(other.pairs) for one, other in combinations(parts, 2))
    refuse_if(len(parts) > 1 and apart, "the adapters have no layer in common", fix="analyze each by itself")
    first = parts[0].adapter
    named, revision = first.own_base() if base is None else (base, None)
    source = find_base(named, revision)
    other = next(
        (each for each in parts if each.adapter.metadata.base_fingerprint not in (None, source.fingerprint)), None
    )
    if other is not None:
        what = f"{other.name} was trained on another base model: on {other.adapter.base_model}, not on {source.name}"
        raise LoraError(what, where=other.adapter.folder, fix=f"use --base {other.adapter.base_model}, or leave it out")
    stored, transposed = stored_tensors(source.folder), bool(first.config.get("fan_in_fan_out"))
    pairs = list(combinations(parts, 2)) or [(parts[0], None)]
    found = Analyzed(
        [each.name for each in parts], source.name, {each.name: [] for each in parts}, {}, [], _notes(parts)
    )
    for name in sorted(dict.fromkeys(name for each in parts for name in each.pairs), key=in_order):
        own = {each.name: each for each in parts if name in each.pairs}
        updates = {each.name: decomposed(*each.factors(name, 1), 1.0) for each in own.values()}
        shape = next(iter(own.values())).shape(name)[:0:-1]
        weight = weight_beside(source, stored, name, shape, transposed=transposed)  # type: ignore[arg-type]
        if weight is None:
            found.missing.append(name)
        else:
            most = max(len(values) for _, values, _ in updates.values())
            top = largest(W := weight.float(), most, iterations=4)[1]  # of a large W a little small
            rows = {each: amplified(name, update, W, top) for each, update in updates.items()}
            for each, row in rows.items():
                found.amplified[each] += [] if row is None else [row]
        directions = {each.name: (_rows(each.factors(name, 1)[0]), updates[each.name][2]) for each in own.values()}
        directions[RANDOM] = _random(shape[1], own[next(iter(own))].shape(name)[0])
        for one, second in pairs:
            names = (one.name, RANDOM if second is None else second.name)
            if all(each in directions for each in names):
                of_A, of_update = (similarity(*two) for two in zip(*(directions[each] for each in names), strict=True))
                found.similar.setdefault(names, []).append(Similar(name, of_A, of_update, shape[1]))
    if output is not None:
        _write(found, output)
    return found


def _rows(A: Tensor) -> Tensor:
    """Right-singular directions of A: (min(rank, in), in)."""
    return torch.linalg.svd(A.double(), full_matrices=False)[2]


def _random(inputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """Of a normal A, twice: it has no update."""
    rows = _rows(torch.randn(rank, inputs, generator=torch.Generator().manual_seed(2**31 - 1)))
    return rows, rows


def _named(parts: Sequence[Part]) -> list[Part]:
    """With names that differ from each other and from RANDOM; where folders have the same, all are numbered."""
    if len({RANDOM, *(each.name for each in parts)}) > len(parts):
        return list(parts)
    return [replace(each, name=f"{each.name} ({at})") for at, each in enumerate(parts, 1)]


def _notes(parts: Sequence[Part]) -> list[str]:
    grouped = [each.name for each in parts if each.group > 1]
    quantized = {each.adapter.metadata.quantization for each in parts} - {None, "none"}
    notes = [f"{name} is QA-LoRA: its A is analyzed with a column for each input, as it computes" for name in grouped]
    if quantized:
        notes.append(f"W is as stored; training saw it quantized ({', '.join(sorted(map(str, quantized)))})")
    return notes


# ── shown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(found: Analyzed) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and rows, means over the layers of each matrix: table 7 of each adapter, similarity of each pair."""
    made = []
    for name, layers in found.amplified.items():
        rows = []
        for matrix, own in by_matrix(layers).items():
            numbers = [
                mean(getattr(each, key) for each in own) for key in asdict(own[0]) if key not in ("layer", "rank")
            ]
            factor = math.exp(mean(math.log(each.amplification) for each in own))
            rows.append(
                [matrix, f"{mean(each.rank for each in own):g}", *(f"{each:.3g}" for each in numbers), f"{factor:.3g}"]
            )
        heads = ["matrix", "k", "‖ΔW‖", "‖W‖", "‖UᵀWV‖ of ΔW", "of W", "random", "amplified"]
        made.append((f"{name}: what its directions have in W, and by how much it amplifies them", heads, rows))
    for (one, other), layers in found.similar.items():
        rows = []
        for matrix, own in by_matrix(layers).items():
            numbers = [each.numbers() for each in own]
            means = {key: mean(each[key] for each in numbers) for key in numbers[0]}
            for what, said in (("first", "1 in 1"), ("first_in_all", "1 in all"), ("all", "all in all")):
                shares = (f"{means[f'{of}_{what}']:.3f}" for of in ("A", "update", RANDOM))
                rows.append([matrix, said, *shares])
        heads = ["matrix", "directions", "A", "ΔW", "chance"]
        made.append((f"{one} and {other}: the share of directions that they have in common", heads, rows))
    return made


def print_analyzed(found: Analyzed, console: Console) -> None:
    say = say_on(console)
    for title, heads, rows in tables(found):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for at, head in enumerate(heads):
            table.add_column(head, justify="right" if at else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        say(title)
        console.print(table)
        say("")
    if found.missing:
        say(
            f"{len(found.missing)} layers are not in {found.base} under their names, so not compared with their weights"
        )
    for note in found.notes:
        say(note)


def _similarity_picture(layers: Sequence[Similar], title: str) -> bytes:
    """A column for each matrix, A above ΔW: φ(i, j), as the paper's figures 3 and 4 show it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrices = by_matrix(layers)
    figure = Figure(figsize=(1.2 + 2.2 * len(matrices), 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(matrices), squeeze=False)
    for column, (matrix, own) in enumerate(matrices.items()):
        for axes, name, of in zip(panels[:, column], ("of_A", "of_update"), ("A", "ΔW"), strict=True):
            grid = _mean_grid(own, name)
            size = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
            drawn = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=size)
            axes.set_title(f"{of} of {matrix}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("j, directions of the second", fontsize=9)
    figure.supylabel("i, of the first", fontsize=9)
    figure.colorbar(drawn, ax=panels, label="φ(i, j)")
    return png(figure)


def _write(found: Analyzed, output: Path) -> None:
    """analysis.json, pictures, and one page that holds all of it."""
    pictures: dict[str, bytes] = {}
    for at, (pair, layers) in enumerate(found.similar.items(), 1):
        pictures[f"similarity-{at}.png"] = _similarity_picture(layers, " and ".join(pair))
    for at, (name, layers) in enumerate(found.amplified.items(), 1):
        if layers:
            values = {each.layer: math.log10(each.amplification) for each in layers}
            pictures[f"amplification-{at}.png"] = by_block({f"{name}: log₁₀ of the amplification": values})
    shown = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    page = render(
        "analysis.html.jinja",
        title=f"lora analyze: {', '.join(found.names)}",
        found=found,
        tables=tables(found),
        pictures=shown,
    )
    with whole_output(require_place(output)) as folder:
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
        write_json(folder / "analysis.json", found.as_dict())
        (folder / "analysis.html").write_text(page, encoding="utf-8")
