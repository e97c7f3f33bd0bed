"""A sweep for people: the table on the screen, the picture, and both as one page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_cli.files import write_bytes
from lora_cli.pages.render import render
from lora_cli.screen import say_on, styled
from lora_cli.studies.sweep_result import interval, label, shown
from lora_cli.training.loss_picture import DARK, LIGHT, blank, finished
from lora_cli.training.report_page import no_traces
from lora_cli.training.verdict import count, duration, half_width, is_number, loss

COLUMNS = ("parameters", "loss", "below the base", "above the best", "time")


def cells(point: Mapping[str, Any]) -> list[str]:
    """A row of the table: the values that were varied, then COLUMNS; of an unfinished point its state."""
    varied = [shown(value) for value in point["settings"].values()]
    if "loss" not in point:
        return [*varied, count(point["trained_parameters"]), point["state"], "", "", duration(point["seconds"])]
    is_best = point["behind"]["gain"] == 0
    values = loss(point["loss"]), interval(point["gain"]), "" if is_best else interval(point["behind"])
    return [*varied, count(point["trained_parameters"]), *values, duration(point["seconds"])]


def print_sweep(found: Mapping[str, Any], console: Console) -> None:
    points = found["points"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for key in points[0]["settings"]:
        table.add_column(key, overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        style = "bold" if point["name"] == found["recommended"] else ""
        table.add_row(*(styled(each, style) for each in cells(point)))
    console.print(table)
    say = say_on(console)
    say("losses in nats a target token; behind ±: half of the 95 % interval on the same validation examples")
    for line in (*problems(found), found["recommendation"]):
        say(line)


def problems(found: Mapping[str, Any]) -> list[str]:
    return [f"{each['name']}: {each['why']}" for each in found["points"] if each["why"]]


def write_page(path: Path, found: Mapping[str, Any]) -> None:
    """One HTML file with the recommendation, the picture and the table; replaces an older one."""
    with no_traces(path.parent):
        light, dark = (picture(found, ink) for ink in (LIGHT, DARK))
    rows = [(each["name"] == found["recommended"], cells(each)) for each in found["points"]]
    keys = list(found["points"][0]["settings"])
    images = {"light": light, "dark": dark}
    encoded = {name: each and base64.b64encode(each).decode() for name, each in images.items()}
    page = render(
        "sweep.html.jinja",
        title=path.parent.resolve().name,
        keys=keys,
        columns=COLUMNS,
        rows=rows,
        problems=problems(found),
        rungs=[
            (label(each), count(at["step"]), loss(at["loss"]), interval(at["behind"]) if at["behind"]["gain"] else "")
            for each in found["points"]
            for at in each["rungs"]
        ],
        found=found,
        **encoded,
    )
    write_bytes(path, page.encode())


def picture(found: Mapping[str, Any], ink: Any = LIGHT) -> bytes | None:
    """PNG: how far each point's loss is below the base's, with its interval; None where no point is finished.

    Over the values of the axis if there is one and they are numbers, else over the trained parameters if these differ.
    """
    points = [each for each in found["points"] if "gain" in each]
    if not points:
        return None
    axes = blank(ink)
    places, name, named = _places(points)
    heights = [each["gain"]["gain"] for each in points]
    halves = [half_width(each["gain"]) or 0.0 for each in points]
    axes.errorbar(places, heights, yerr=halves, fmt="o", color=ink.training, capsize=4, linewidth=1.6)
    for place, height, point in zip(places, heights, points, strict=True):
        if named and name:
            how = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 8, "color": ink.text}
            axes.annotate(label(point).replace("adapter.", "").replace("train.", ""), (place, height), **how)
        if point["name"] == found["recommended"]:
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": ink.validation, "linestyle": "none"}
            axes.plot([place], [height], "o", **ring, label="recommended")
    if name:
        axes.set_xscale("log")
        axes.set_xticks(sorted(set(places)), [f"{each:,g}" for each in sorted(set(places))])
        axes.minorticks_off()
    else:
        axes.set_xticks(
            places,
            [shown(*each["settings"].values()) if len(each["settings"]) == 1 else label(each) for each in points],
        )
    return finished(
        axes, ink, title="Validation loss below the base's", across=name or ", ".join(points[0]["settings"])
    )


def _places(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], str, bool]:
    """(where each point is, what that is or nothing where points only have names, whether to write their names)."""
    keys = list(points[0]["settings"])
    values = [each["settings"][keys[0]] for each in points]
    if len(keys) == 1 and all(is_number(each) and not isinstance(each, bool) and each > 0 for each in values):
        return values, keys[0], False
    parameters = [each["trained_parameters"] for each in points]
    if len(set(parameters)) > len(points) / 2 and all(parameters):
        return parameters, "trained parameters", True
    return list(range(len(points))), "", True
