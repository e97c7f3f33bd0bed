"""The report of a run as one page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.files import working_beside, write_bytes
from lora_cli.pages.render import render
from lora_cli.training import verdict
from lora_cli.training.loss_picture import DARK, LIGHT, loss_picture

MOST_LAYERS = 12  # shown before the list is opened


def write_report_page(
    folder: Path, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], **shown: Any
) -> None:
    """Write loss.png (where a line has a loss) and report.html into a run folder; replaces older ones in one move.

    shown: recipe, environment and warnings, as `report_page` takes them.
    """
    with no_traces(folder):
        light, dark = (loss_picture(metrics, report, ink) for ink in (LIGHT, DARK))
    page = report_page(report, title=folder.resolve().name, light=light, dark=dark, **shown)
    files = {"loss.png": light, "report.html": page.encode()}
    for name, content in files.items():
        if content is not None:
            write_bytes(folder / name, content)


@contextmanager
def no_traces(folder: Path) -> Iterator[None]:
    """Within, matplotlib keeps its list of fonts in a temporary folder of the run and not in the user's home."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    with working_beside(folder / "loss.png") as place:
        os.environ["MPLCONFIGDIR"] = str(place)
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def report_page(
    report: Mapping[str, Any], *, light: bytes | None = None, dark: bytes | None = None, **shown: Any
) -> str:
    """One HTML file. report: see `verdict`. light, dark: PNGs of the loss for either background.

    shown: title; recipe, as YAML; environment, by name; warnings, a line each. Whatever is missing or not finite is
    left out or shown as –.
    """
    layers = (report.get("update_sizes") or {}).get("layers") or {}
    layers = {name: ratio for name, ratio in layers.items() if verdict.is_number(ratio)}
    return render(
        "report.html.jinja",
        **shown,
        report=report,
        light=light and base64.b64encode(light).decode(),
        dark=dark and base64.b64encode(dark).decode(),
        words=verdict,
        layers=layers,
        largest_layer=max(layers.values(), default=0),
        most_layers=MOST_LAYERS,
    )
