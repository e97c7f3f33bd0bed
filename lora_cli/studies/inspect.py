"""`lora inspect`: what an adapter adds to each layer, from A and B alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_cli.adapters.file import read_adapter
from lora_cli.adapters.low_rank import pairs_of, singular_values
from lora_cli.adapters.opened import adapter_folder
from lora_cli.adapters.update_size import weight_norm
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import dense_tensor, parts_of
from lora_cli.base.weight_files import StoredTensor, stored_tensors
from lora_cli.errors import LoraError, home_expanded
from lora_cli.files import write_bytes
from lora_cli.screen import say_on

DEAD = 1e-6  # of the largest singular value: what fp32 hardly holds beside it
_SHARE = 0.9  # of ‖ΔW‖²
_MARK = b"lora inspect"  # in a picture


@dataclass(frozen=True)
class Layer:
    """The update ΔW = scaling · B A of one layer. shape: (out_features, in_features). parameters: trained.

    singular_values: of ΔW, from the largest down. weight_norm: ‖W‖ of what it is added to, where that was looked at.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    scaling: float
    singular_values: list[float]
    weight_norm: float | None

    @property
    def norm(self) -> float:
        """‖ΔW‖, the root of its energy."""
        return math.hypot(*self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum; 0 of no update.

        Between 1 and the rank: how many directions of equal size hold as much. Source: Roy & Vetterli 2007,
        The effective rank: a measure of effective dimensionality.
        """
        total = sum(self.singular_values)
        shares = [value / total for value in self.singular_values if value] if total else []
        return math.exp(-sum(each * math.log(each) for each in shares)) if shares else 0.0

    @property
    def directions_90(self) -> int:
        """The fewest directions that hold 90 % of the energy ‖ΔW‖²."""
        held = np.cumsum(np.square(self.singular_values))
        return int(np.searchsorted(held, _SHARE * held[-1]) + 1) if held[-1] else 0

    @property
    def dead_directions(self) -> int:
        """How many of the rank's directions add nothing."""
        return self.rank - sum(value > DEAD * self.singular_values[0] for value in self.singular_values)

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def inert(self) -> bool:
        """Whether the layer computes as without an adapter, or so nearly that fp32 cannot tell."""
        return self.norm == 0 or (self.ratio is not None and self.ratio < DEAD)

    def as_dict(self) -> dict[str, Any]:
        names = ("norm", "effective_rank", "directions_90", "dead_directions", "ratio", "inert")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Inspected:
    """An adapter, layer by layer. base: the model beside whose weights it was looked at."""

    adapter: Path
    base_model: str | None
    base: str | None
    layers: list[Layer]

    def totals(self) -> dict[str, Any]:
        """Numbers of the whole adapter; medians over its layers. share: of dead directions."""
        layers = self.layers
        ratios = [each.ratio for each in layers if each.ratio is not None]
        return {
            "layers": len(layers),
            "parameters": sum(each.parameters for each in layers),
            "norm": math.hypot(*(each.norm for each in layers)),
            "directions": sum(each.rank for each in layers),
            "dead_directions": sum(each.dead_directions for each in layers),
            "inert_layers": [each.name for each in layers if each.inert],
            "rank": median(each.rank for each in layers),
            "effective_rank": median(each.effective_rank for each in layers),
            "directions_90": median(each.directions_90 for each in layers),
            "ratio": median(ratios) if ratios else None,
            "weights_not_found": sum(each.weight_norm is None for each in layers) if self.base else 0,
        }

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        named = {"adapter": str(self.adapter), "base_model": self.base_model, "base": self.base}
        return named | {"totals": self.totals(), "layers": [each.as_dict() for each in self.layers]}


def inspect_adapter(source: str, base: str | None = None) -> Inspected:
    """Look at a run's adapter, or one of lora or PEFT. base: also compare with its weights, read one at a time.

    Raises LoraError for tensors that are not numbers, do not fit each other, or do not fit the base.
    """
    adapter = read_adapter(adapter_folder(Path(home_expanded(source))))
    fix = "merge it, which says how large its effect is: lora merge ADAPTER --output FOLDER"
    pairs = pairs_of(adapter, fix=fix)
    found, at = find_base(base) if base is not None else None, adapter.folder
    if found is not None and adapter.metadata.base_fingerprint not in (None, found.fingerprint):
        what = f"the adapter was trained on another base model: on {adapter.base_model}, not on {found.name}"
        raise LoraError(what, where=at, fix=f"use --base {adapter.base_model}, or leave it out")
    norm_of = partial(_norm_beside, found, stored_tensors(found.folder)) if found is not None else lambda *_: None
    layers = []
    for name, (A, B) in sorted(pairs.items(), key=lambda each: in_order(each[0])):
        rank, shape = len(A), (len(B), A.shape[1])
        scaling = adapter.alphas[name] / rank
        group = adapter.metadata.group_size or 1 if adapter.metadata.method == "qa_lora" else 1
        trained = rank * (shape[0] + shape[1] // group)  # QA-LoRA stores a column of A for each input of a group
        values = singular_values(A, B, scaling).tolist()
        layers.append(Layer(name, shape, rank, trained, scaling, values, norm_of(name, shape)))
    return Inspected(at, adapter.base_model, base, layers)


def in_order(name: str) -> list[tuple[int, str]]:
    """Block 10 comes after block 9."""
    return [(int(part) if part.isdecimal() and len(part) < 9 else -1, part) for part in name.split(".")]


def _norm_beside(
    base: BaseSource, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]
) -> float | None:
    weight = weight_beside(base, stored, name, shape)
    return None if weight is None else weight_norm(weight)


def weight_beside(
    base: BaseSource, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, int], *, transposed: bool = False
) -> Tensor | None:
    """W of the layer of that name, which a checkpoint may know without what leads to it, or below another module.

    shape: (out_features, in_features), as is the result. transposed: whether a square one is stored as (in, out).

    None where the checkpoint holds no such tensor: some models make several layers of one, or one of several.
    """
    own = f"{name}.weight"
    ends = [each for each in stored if each == own or f".{own}".endswith(f".{each}") or each.endswith(f".{own}")]
    if own not in stored and len(ends) != 1:
        return None
    tensor = own if own in stored else ends[0]
    weight = dense_tensor(stored, tensor, parts_of(stored))
    if tuple(weight.shape) not in (shape, shape[::-1]):
        what = f"{name}: the update is {shape}, but the weight of {base.name} is {tuple(weight.shape)}"
        raise LoraError(what, fix="name the base model that the adapter was trained on with --base")
    turned = transposed and stored[tensor].shape == shape[::-1]  # a quantized one is stored in another shape
    return weight.T if turned or tuple(weight.shape) != shape else weight


def print_inspected(found: Inspected, console: Console) -> None:
    """The layers as a table, then what holds of all."""
    say, totals = say_on(console), found.totals()
    parts = zip(*(each.name.split(".")[:-1] for each in found.layers), strict=False)
    start = "".join(f"{same[0]}." for same in takewhile(lambda each: len(set(each)) == 1, parts))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"{start}…" if start else "layer", overflow="fold")
    dead = totals["dead_directions"]
    heads = {"rank": True, "effective": True, "90 % in": True, "dead": dead, "‖ΔW‖": True, "of ‖W‖": found.base}
    for head in (head for head, shown in heads.items() if shown):
        table.add_column(head, justify="right", no_wrap=True)
    for each in found.layers:
        held = ("inert", "") if each.inert else (f"{each.effective_rank:.1f}", f"{each.directions_90}")
        cells = [f"{each.rank}", *held, *([f"{each.dead_directions or ''}"] if dead else []), f"{each.norm:.3g}"]
        cells += ["" if each.ratio is None else f"{each.ratio:.2%}"] if found.base else []
        table.add_row(each.name.removeprefix(start), *cells, style="yellow" if each.inert else "")
    console.print(table)
    say("")
    say(f"{totals['layers']} layers, {totals['parameters']:,} trained parameters, ‖ΔW‖ {totals['norm']:.3g} in all")
    say(
        f"median layer: rank {totals['rank']:g}, effective rank {totals['effective_rank']:.1f}, "
        f"90 % of the energy in {totals['directions_90']:g} directions"
    )
    if totals["ratio"] is not None:
        largest = max(found.layers, key=lambda each: each.ratio or 0.0)
        most = f"at most {largest.ratio:.2%} in {largest.name}"
        say(f"beside the weights: {totals['ratio']:.2%} in the median layer, {most}")
    if dead:
        say(f"dead directions: {dead:,} of {totals['directions']:,} (below {DEAD:g} of the largest)")
    if inert := totals["inert_layers"]:
        say(f"inert layers: {len(inert)}: {', '.join(inert[:3])}{' …' if len(inert) > 3 else ''}")
    if lost := totals["weights_not_found"]:
        say(f"{lost} layers are not in {found.base} under their names, so not compared with their weights")


def write_picture(found: Inspected, path: Path) -> None:
    """PNG: size and effective rank of each update, blocks from left to right, a row for each matrix of a block.

    Raises LoraError if the path holds something else.
    """
    if path.exists() and (path.is_dir() or _MARK not in path.read_bytes()[:200]):
        what = "refusing to overwrite a file that lora did not write"
        raise LoraError(what, where=path, fix="choose another --picture")
    sizes = {each.name: each.ratio if found.base else each.norm for each in found.layers}
    shown = {"‖ΔW‖ / ‖W‖" if found.base else "‖ΔW‖": sizes}
    write_bytes(path, by_block(shown | {"effective rank": {each.name: each.effective_rank for each in found.layers}}))


def by_block(shown: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """PNG of numbers by layer, under a title each: blocks from left to right, a row for each matrix of a block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(shown.values())))
    places = {name: (re.sub(r"(^|\.)\d+\.", r"\1", name, count=1), _block(name)) for name in names}
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = max(column for _, column in places.values()) + 1
    figure = Figure(figsize=(9, len(shown) * (0.8 + 0.25 * len(rows))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for at, (title, values) in enumerate(shown.items()):
        grid = np.full((len(rows), columns), np.nan)
        for name, (row, column) in places.items():
            value = values[name]
            grid[rows.index(row), column] = np.nan if value is None else value
        axes = figure.add_subplot(len(shown), 1, at + 1)
        drawn = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=0)
        axes.set_yticks(range(len(rows)), [row.rpartition(".")[2] for row in rows])
        axes.set_title(title, loc="left")
        figure.colorbar(drawn, ax=axes)
    axes.set_xlabel("block")
    return png(figure)


def png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": _MARK.decode()})
    return stream.getvalue()


def _block(name: str) -> int:
    number = re.search(r"(?:^|\.)(\d{1,4})\.", name)
    return int(number[1]) if number else 0
