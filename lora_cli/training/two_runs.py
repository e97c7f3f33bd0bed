"""`lora runs A B`: what two runs were asked, what came of it, and whether their difference is more than chance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_cli.errors import LoraError
from lora_cli.evaluation.gain import paired_gain
from lora_cli.foreign import kind, parse_json, read_bytes
from lora_cli.recipe import differences
from lora_cli.screen import say_on
from lora_cli.training import verdict
from lora_cli.training.checkpoint import read_losses
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.runs import DEFAULT_FOLDER, Run, list_runs

_MEASURED = ("base_validation_loss", "best_validation_loss", "last_loss", "steps", "tokens", "target_tokens", "seconds")
_MEASURED += ("tokens_per_second", "peak_memory_bytes", "trained_parameters", "verdict")
_SHOWN = {
    "verdict": ("verdict", str),
    "base_validation_loss": ("base, validation loss", verdict.loss),
    "best_validation_loss": ("best validation loss", verdict.loss),
    "last_loss": ("last training loss", verdict.loss),
    "general_text_change": ("loss on general text", lambda value: verdict.signed(value, None)),
    "steps": ("steps", verdict.count),
    "tokens": ("tokens", verdict.count),
    "trained_parameters": ("trained parameters", verdict.count),
    "seconds": ("time of the steps", verdict.duration),
    "tokens_per_second": ("tokens/s", verdict.count),
    "peak_memory_bytes": ("peak memory", verdict.memory),
}


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """The document of --json.

    runs: both, as `lora runs` lists them. settings: those that differ, [first, second] by key. measured: [first,
    second] by key of report.json, None where there is none. gain: of the second over the first on the same validation
    examples, as `Gain` has it, or None; why_no_gain says why. Raises LoraError for a folder that is not a run.
    """
    folders = [RunFolder(_a_run(each)) for each in (first, second)]
    listed = [list_runs(each.path)[0] for each in folders]
    settings = differences(*(each.stored_recipe() for each in folders))
    reports = [read_report(each) for each in folders]
    gain, why = _gain(folders)
    return {
        "runs": [asdict(each) for each in listed],
        "settings": {".".join(key): [old, new] for key, old, new in settings if key != ("output",)},
        "measured": {name: [each.get(name) for each in reports] for name in (*_MEASURED, "general_text_change")},
        "gain": gain and asdict(gain),
        "why_no_gain": why,
    }


def print_comparison(found: dict[str, Any], console: Console) -> None:
    say = say_on(console)
    names = [run["name"] for run in found["runs"]]
    table = Table("", *names, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    table.add_row("state", *(Run(**run).progress for run in found["runs"]))
    for key, values in found["settings"].items():
        table.add_row(key, *("–" if value is None else str(value) for value in values))
    for key, (name, words) in _SHOWN.items():
        values = found["measured"][key]
        if any(value is not None for value in values):
            table.add_row(name, *("–" if value is None else words(value) for value in values))
    console.print(table)
    if not found["settings"]:
        say("no setting differs")
    gain = found["gain"]
    say(f"no interval of the difference: {found['why_no_gain']}" if gain is None else _words(gain, names[1]))


def _words(gain: dict[str, Any], second: str) -> str:
    """`b is 0.0120 ± 0.0040 nats a token better, on the same 100 validation examples`."""
    half = verdict.half_width(gain)
    places = max(4, verdict.decimals(half))
    size = f"{abs(gain['gain']):.{places}f}" + ("" if half is None else f" ± {half:.{places}f}")
    way = "better" if gain["gain"] > 0 else "worse"
    text = f"{second} is {size} nats a token {way}, on the same {verdict.count(gain['examples'])} validation examples"
    if half is None:
        return f"{text}; a single example gives no interval"
    return text if abs(gain["gain"]) > half else f"{text}: not certain, the 95 % interval includes 0"


def _a_run(path: Path) -> Path:
    """The folder of a run, or the run of that name in the default folder."""
    place = path if path.exists() else DEFAULT_FOLDER / path
    if not all((place / name).is_file() for name in ("recipe.yaml", "environment.json")):
        raise LoraError("this is not the folder of a run", where=path, fix="lora runs lists them")
    return place


def read_report(folder: RunFolder) -> dict[str, Any]:
    """What report.json measured, without what is not a number or a text; {} without one."""
    if kind(folder.report) is None:
        return {}
    try:
        found = parse_json(read_bytes(folder.report))
    except (OSError, ValueError) as error:
        raise LoraError(f"it cannot be read: {error}", where=folder.report, fix="lora runs shows what can be") from None
    found = found if isinstance(found, dict) else {}
    general = found.get("general_text")
    values = {name: found[name] for name in _MEASURED if verdict.is_number(found.get(name))}
    if isinstance(found.get("verdict"), str):
        values["verdict"] = found["verdict"]
    if isinstance(general, dict) and verdict.is_number(general.get("change")):
        values["general_text_change"] = general["change"]
    return values


def _gain(folders: list[RunFolder]) -> tuple[Any, str | None]:
    """The second's gain over the first, or None and why. Losses of single examples are in the newest checkpoint."""
    data = [each.stored_environment().get("data_fingerprint") for each in folders]
    if data[0] is None or data[0] != data[1]:
        return None, "they were not prepared from the same data, so their validation examples may differ"
    losses = []
    for folder in folders:
        newest = next(reversed(folder.list_checkpoints()), None)
        if newest is None:
            return None, f"{folder.path} has no checkpoint, which holds the loss of each validation example"
        losses.append(read_losses(newest))
        if "validation.best" not in losses[-1]:
            return None, f"{folder.path} has not scored its adapter on validation data"
    if not losses[0]["validation.targets"].equal(losses[1]["validation.targets"]):
        return None, "their validation examples differ"
    first, second = (each["validation.best"] for each in losses)
    return paired_gain(first, second, losses[0]["validation.targets"]), None
