"""What a run came to, as one page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import in_html
from lora_cli.files import disk_errors, human_bytes, write_bytes
from lora_cli.training.loss_picture import DARK, LIGHT, loss_picture
from lora_cli.training.verdict import (
    best_words,
    count,
    decimals,
    duration,
    forgetting_words,
    half_width,
    is_number,
    judge,
    percent,
    perplexity,
    plus_or_minus,
    signed,
)

MOST_LAYERS = 12  # shown without being asked for

_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=generator content=lora-report>
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #686e76; --line: #d9dce0; --panel: #f4f5f7;
  --bar: #2f6fb5; --good: #1d7a3a; --unsure: #8a5a00; --bad: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #17191c; --faint: #9aa0a8; --line: #34383d;
  --panel: #1f2226; --bar: #78b0ee; --good: #7fd195; --unsure: #e5b45c; --bad: #ff8a80; }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto 4rem; padding: 0 1.2rem; }}
h1 {{ font-size: 1rem; font-weight: 600; color: var(--faint); margin: 0 0 .8rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 2.4rem 0 .6rem; }}
.verdict {{ border-left: 5px solid var(--edge); padding: .1rem 0 .1rem 1.1rem; }}
.verdict p {{ margin: .2rem 0; }} .verdict .headline {{ font-size: 1.35rem; line-height: 1.35; font-weight: 650; }}
.learned {{ --edge: var(--good); }} .not-certain {{ --edge: var(--unsure); }} .nothing-learned {{ --edge: var(--bad); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .7rem;
  margin: 1.6rem 0; padding: 0; }}
.tiles div {{ background: var(--panel); border-radius: 8px; padding: .7rem .9rem; }}
.tiles dt {{ color: var(--faint); font-size: .84rem; }} .tiles dd {{ margin: 0; font-size: 1.2rem; font-weight: 600; }}
.tiles small {{ display: block; font-weight: 400; font-size: .84rem; color: var(--faint); }}
img {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }}
td, th {{ padding: .22rem 1.4rem .22rem 0; text-align: left; vertical-align: top; }}
th {{ font-weight: 600; border-bottom: 1px solid var(--line); }} .n {{ text-align: right; }}
.layers {{ width: 100%; font-size: .87rem; }} .layers td:first-child {{ overflow-wrap: anywhere; }}
.layers td:last-child {{ width: 45%; padding-right: 0; }}
.bar {{ display: block; height: .62rem; margin-top: .42rem; background: var(--bar); border-radius: 2px;
  min-width: 1px; }}
.faint {{ color: var(--faint); }} p {{ max-width: 46rem; }}
pre {{ font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); border-radius: 8px; padding: .9rem 1.1rem; }}
summary {{ cursor: pointer; color: var(--faint); margin: .5rem 0; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report_page(
    folder: Path,
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    recipe: str,
    environment: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> None:
    """Write loss.png (where a line has a loss) and report.html into a run folder; replaces older ones in one move."""
    with _no_traces(folder):
        light, dark = (loss_picture(metrics, report, ink) for ink in (LIGHT, DARK))
    title = folder.resolve().name
    page = report_page(
        report, title=title, recipe=recipe, environment=environment, warnings=warnings, light=light, dark=dark
    )
    files = {"loss.png": light, "report.html": page.encode()}
    for name, content in files.items():
        if content is not None:
            write_bytes(folder / name, content)


@contextmanager
def _no_traces(folder: Path) -> Iterator[None]:
    """Within, matplotlib keeps its list of fonts in a folder of the run that goes again, not in the user's home."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".matplotlib.tmp-", dir=folder) as place:
        os.environ["MPLCONFIGDIR"] = place
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def report_page(
    report: Mapping[str, Any],
    *,
    title: str,
    recipe: str,
    environment: Mapping[str, Any],
    warnings: Sequence[str] = (),
    light: bytes | None = None,
    dark: bytes | None = None,
) -> str:
    """One HTML file. report: see `verdict`. recipe: as YAML. light, dark: PNGs of the loss for either background.

    Whatever is missing or not finite is left out or shown as –.
    """
    parts = [
        _verdict(report),
        _tiles(report),
        _picture(light, dark, report),
        _warnings(warnings),
        _held_out(report),
        _general(report),
        _updates(report),
        _cost(report),
        f"<h2>Recipe</h2>\n<pre>{in_html(recipe.strip())}</pre>",
        _environment(environment),
    ]
    return _PAGE.format(title=in_html(title), body="\n".join(part for part in parts if part))


# ── the parts, top to bottom ────────────────────────────────────────────────────────────────────────────────────


def _verdict(report: Mapping[str, Any]) -> str:
    verdict = judge(report)
    fix = f"<p class=faint>To try: {in_html(verdict.fix)}.</p>" if verdict.fix else ""
    kind = verdict.outcome.replace(" ", "-")
    return (
        f'<div class="verdict {kind}"><p class=headline>{in_html(verdict.headline)}</p>'
        f"<p>{in_html(verdict.why)}</p>{fix}</div>"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = []
    found = report.get("validation") or {}
    if is_number(found.get("gain")):
        gain = signed(found["gain"], half_width(found))
        change = f"{perplexity(found['before'])} → {perplexity(found['after'])}"
        tiles.append(("validation perplexity", change, f"gain {gain} nats a token"))
    general = report.get("general_text") or {}
    if is_number(general.get("change")):
        change = f"{perplexity(general['before'])} → {perplexity(general['after'])}"
        tiles.append(
            ("perplexity of general text", change, f"{signed(general['change'], half_width(general))} nats a token")
        )
    speed = report.get("tokens_per_second")
    tiles.append(("time", duration(report.get("seconds")), f"{count(speed)} tokens/s" if is_number(speed) else ""))
    if is_number(report.get("peak_memory_bytes")):
        tiles.append(("peak memory", human_bytes(report["peak_memory_bytes"]), ""))
    cells = (
        f"<div><dt>{in_html(name)}</dt><dd>{in_html(value)}<small>{in_html(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f"<dl class=tiles>{''.join(cells)}</dl>"


def _picture(light: bytes | None, dark: bytes | None, report: Mapping[str, Any]) -> str:
    if light is None or dark is None:
        return "<p class=faint>No step of this run has a loss to draw.</p>"
    best = best_words(report)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_url(dark)}">'
        f'<img alt="training and validation loss by step" src="{_data_url(light)}"></picture>'
        + (f"<p class=faint>{in_html(best[0].upper() + best[1:])}.</p>" if best else "")
    )


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return "<h2>Warnings</h2>\n<ul>" + "".join(f"<li>{in_html(each)}</li>" for each in warnings) + "</ul>"


def _held_out(report: Mapping[str, Any]) -> str:
    found = report.get("validation")
    if not found:
        return ""
    note = f"{count(found.get('examples'))} in all, each counted by its target tokens. {_interval(found)}"
    return f"<h2>Held-out examples</h2>\n{_before_after(found, 'gain', found.get('gain'))}<p class=faint>{note}</p>"


def _general(report: Mapping[str, Any]) -> str:
    found, words = report.get("general_text"), forgetting_words(report)
    if not found or not words:
        return ""
    said = words.rpartition(": ")[2] if ": " in words else ""
    said = f"<p>{in_html(said[0].upper() + said[1:])}.</p>" if said else ""
    note = (
        f"{count(found.get('tokens'))} tokens of {in_html(str(found.get('source')))}, which the run was not "
        f"trained on. {_interval(found)}"
    )
    table = _before_after(found, "change", found.get("change"))
    return f"<h2>General text: what was forgotten</h2>\n{said}{table}<p class=faint>{note}</p>"


def _updates(report: Mapping[str, Any]) -> str:
    found = report.get("update_sizes") or {}
    layers = {name: ratio for name, ratio in (found.get("layers") or {}).items() if is_number(ratio)}
    if not layers:
        return ""
    largest = max(layers.values())
    first = sorted(layers, key=lambda name: -layers[name])[:MOST_LAYERS]
    intro = (
        "The size of what was added to each layer, beside the layer's own weight: ‖ΔW‖ / ‖W‖, in Frobenius norms. "
        f"Median {percent(found['median'])}, largest {percent(found['largest'])}."
    )
    every = ""
    if len(layers) > len(first):
        rows = _layer_rows(layers.items(), largest)
        every = f"<details><summary>all {len(layers):,} layers, in the model's order</summary>{rows}</details>"
    rows = _layer_rows(((name, layers[name]) for name in first), largest)
    heading = "the largest" if every else "each layer"
    return f"<h2>Size of the update: {heading}</h2>\n<p class=faint>{intro}</p>{rows}{every}"


def _layer_rows(layers: Iterable[tuple[str, float]], largest: float) -> str:
    rows = (
        f"<tr><td>{in_html(name)}<td class=n>{percent(ratio)}"
        f'<td><span class=bar style="width: {100 * ratio / largest if largest else 0:.1f}%"></span>'
        for name, ratio in layers
    )
    return f"<table class=layers>{''.join(rows)}</table>"


def _cost(report: Mapping[str, Any]) -> str:
    memory = report.get("peak_memory_bytes")
    rows = [
        ("steps", count(report.get("steps"))),
        ("tokens", f"{count(report.get('tokens'))}, of which {count(report.get('target_tokens'))} carried loss"),
        ("training time", duration(report.get("seconds"))),
        ("speed", f"{count(report.get('tokens_per_second'))} tokens/s"),
        ("peak memory", human_bytes(memory) if is_number(memory) else "–"),
        (
            "adapter",
            f"{count(report.get('trained_parameters'))} parameters in {count(report.get('adapted_layers'))} layers",
        ),
        (
            "training loss",
            f"{_number(report.get('first_loss'))} at the first step, {_number(report.get('last_loss'))} at the last",
        ),
        ("shipped", str(report.get("adapter", "–"))),
    ]
    return f"<h2>Cost</h2>\n{_table(rows)}"


def _environment(environment: Mapping[str, Any]) -> str:
    rows = [(name, _plain(value)) for name, value in environment.items()]
    return (
        f"<h2>Versions and fingerprints</h2>\n<details><summary>show</summary>{_table(rows)}</details>" if rows else ""
    )


# ── small pieces ────────────────────────────────────────────────────────────────────────────────────────────────


def _before_after(found: Mapping[str, Any], name: str, difference: Any) -> str:
    rows = "".join(
        f"<tr><td>{who}<td class=n>{_number(loss)}<td class=n>{perplexity(loss) if is_number(loss) else '–'}"
        for who, loss in (("base model", found.get("before")), ("with the adapter", found.get("after")))
    )
    last = signed(difference, half_width(found)) if is_number(difference) else "–"
    head = "<tr><th><th class=n>loss, nats a token<th class=n>perplexity"
    return f"<table>{head}{rows}<tr><td>{name}<td class=n>{last}<td></table>"


def _interval(found: Mapping[str, Any]) -> str:
    if half_width(found) is None:
        return "From a single one no interval can be known."
    places = decimals(half_width(found))
    return f"95 % interval: {plus_or_minus(found['low'], places)} to {plus_or_minus(found['high'], places)}."


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td class=faint>{in_html(a)}<td>{in_html(b)}" for a, b in rows) + "</table>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    return "–" if value is None else str(value)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "–"
