"""The loss of a run as a picture: training losses and their smoothed mean, validation losses, the best step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from lora_cli.training.verdict import is_number

MOST_POINTS = 1000  # drawn of a curve: more than the picture has columns
SMOOTHED_SHARE, MOST_SMOOTHED = 0.05, 301  # of all steps, and steps at most, in the mean that the smooth curve shows


LIGHT = SimpleNamespace(paper="#ffffff", text="#1c1e21", faint="#c9cdd2", training="#2f6fb5", validation="#c4511d")
DARK = SimpleNamespace(paper="#17191c", text="#d6d8db", faint="#3d4248", training="#78b0ee", validation="#f29a63")


def loss_picture(metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any], ink: Any = LIGHT) -> bytes | None:
    """PNG of 1,350 × 675 pixels, or None if no line has a finite loss.

    metrics: lines of metrics.jsonl, of which step, loss and validation_loss are read; values that are missing or not
    finite leave a gap. report: base_validation_loss is drawn at step 0; best_step is marked.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps, losses = _series(metrics, "loss")
    if not len(steps):
        return None
    axes = blank(ink)
    smooth, width = smoothed(losses)
    single = "o" if len(steps) == 1 else ""
    if width > 1:
        axes.plot(*_extremes(steps, losses), color=ink.training, alpha=0.3, linewidth=0.8)
    label = "training" if width == 1 else f"training, mean of {width} steps"
    axes.plot(*_extremes(steps, smooth), single, color=ink.training, linewidth=1.8, label=label)
    top = max(np.percentile(losses, 99.5), smooth.max())  # one spike must not flatten all the rest
    top = max(top, _draw_validation(axes, metrics, report, ink))
    axes.set(ylim=(0, top * 1.08 or 1), xlim=(-0.012 * steps[-1], 1.012 * steps[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return finished(axes, ink, title="Loss", across="step")


def blank(ink: Any) -> Any:
    """Axes of an empty picture of 1,350 × 675 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is looked for, no global state is made
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=150, facecolor=ink.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot(facecolor=ink.paper)


def finished(axes: Any, ink: Any, *, title: str, across: str) -> bytes:
    """PNG of losses in nats, with title, labels, grid and legend as all such pictures have them."""
    axes.set_title(title, loc="left", color=ink.text, fontsize=12, fontweight="bold")
    axes.set_xlabel(across, color=ink.text)
    axes.set_ylabel("nats per target token", color=ink.text)
    axes.tick_params(colors=ink.text)
    axes.grid(axis="y", color=ink.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink.faint)
    beside_title = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3, "borderaxespad": 0.2}
    axes.legend(frameon=False, labelcolor=ink.text, fontsize=9, columnspacing=1.4, **beside_title)
    stream = io.BytesIO()
    axes.figure.savefig(stream, format="png", facecolor=ink.paper)
    return stream.getvalue()


def _draw_validation(axes: Any, metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any], ink: Any) -> float:
    """Draws the validation losses, if there are any; returns the highest."""
    base = {"step": 0, "validation_loss": report.get("base_validation_loss")}
    steps, losses = _series([base, *metrics], "validation_loss")
    if not len(steps):
        return 0.0
    marker = "o-" if len(steps) <= 60 else "-"
    how = {"color": ink.validation, "linewidth": 1.4, "markersize": 4.5}
    axes.plot(*_extremes(steps, losses), marker, **how, label="validation (step 0: base model)")
    at = np.flatnonzero(steps == report.get("best_step"))
    if len(at):
        step, loss = steps[at[-1]], losses[at[-1]]
        ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": ink.validation, "linestyle": "none"}
        axes.plot([step], [loss], "o", **ring, label=f"best: {loss:.4f} at step {step:,.0f}")
    return float(losses.max())


def smoothed(losses: np.ndarray) -> tuple[np.ndarray, int]:
    """(running means, their width in steps): centred and odd; at both ends of what there is of it.

    losses: (steps,), finite. The width is 5 % of the steps.
    """
    window = np.ones(min(int(len(losses) * SMOOTHED_SHARE), MOST_SMOOTHED) // 2 * 2 + 1)
    sums, counts = (np.convolve(each, window, "same") for each in (losses, np.ones_like(losses, np.float64)))
    return sums / counts, len(window)


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines where both are finite numbers, by step."""
    pairs = ((line.get("step"), line.get(name)) for line in metrics)
    kept = sorted({step: value for step, value in pairs if is_number(step) and is_number(value)}.items())
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def _extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest of each group of neighbours, in the order in which they came: no spike is thinned out."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    edges = pairwise(np.linspace(0, len(steps), MOST_POINTS // 2 + 1).astype(int))
    ends = [start + extreme(values[start:end]) for start, end in edges for extreme in (np.argmin, np.argmax)]
    chosen = np.unique(ends)
    return steps[chosen], values[chosen]
