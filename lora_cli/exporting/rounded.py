"""What an exported file in blocks keeps of what a run learned: the file is opened, and measured on rows of the run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_cli.adapters.opened import open_model
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.source import find_base
from lora_cli.base.stored import parameters_stored
from lora_cli.base.weight_files import stored_tensors
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.evaluation.gain import paired_gain, share_kept
from lora_cli.merging.compare import fits_in_fp32
from lora_cli.merging.onto import held_out, kept_examples, losses_of

_LEAST = 0.5  # of what was learned; a file that keeps less is not worth the training


def measure_rounding(
    run: Path,
    base: str | None,
    file: Path,
    kind: str,
    *,
    proof: str | None,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Losses of base, base + adapter and the file on rows that the run keeps prepared, held-out ones if there are any,
    in nats a target token, and the share of the gain that it keeps,
    with its 95 % interval (None where that gain is not sure). None, and said, where they cannot be measured.

    Raises CheckFailed for a file that surely keeps less than half.
    """
    which = "held-out" if (rows := held_out(run)) else "training"
    rows = rows or kept_examples(run, "train")
    why = "no prepared rows of its run are here" if not rows else None
    if proof not in (None, "full"):
        why = f"--proof {proof} opens no model"
    if why := why or _why_not(file):
        say(f"what rounding to {kind} costs was not measured: {why}")
        return None
    say(f"measuring what {kind} keeps of what was learned, on {len(rows)} {which} rows")
    losses: dict[str, Tensor] = {}
    how: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "trust_remote_code": trust_remote_code}
    model = open_model(base, run, **how).model
    losses["adapter"], targets = losses_of(model, rows)
    with adapters_disabled(model):
        losses["base"], _ = losses_of(model, rows)
    del model
    gc.collect()
    losses["exported"], _ = losses_of(open_model(str(file), None, quantization="none", **how).model, rows)
    learned = paired_gain(losses["base"], losses["adapter"], targets)
    sure = learned.low is not None and learned.low > 0
    kept = share_kept(losses["base"], losses["adapter"], losses["exported"]) if sure else (None, None, None)
    means = {name: (each.sum() / targets.sum()).item() for name, each in losses.items()}
    share, _, high = kept
    if share is not None and share < _LEAST and (high is None or high < _LEAST):
        raise CheckFailed(
            f"in {kind} {max(share, 0):.0%} of what was learned is left",
            details=[
                f"loss of {len(rows)} {which} rows: base {means['base']:.4f}, base + adapter {means['adapter']:.4f}, "
                f"in {kind} {means['exported']:.4f}"
            ],
            fix="use --type q8_0; or train with adapter.method: qa_lora and quantization: int4 (then q4_1 is exact); "
            "--proof none writes it all the same",
        )
    return {
        "losses": means,
        "kept": dict(zip(("share", "low", "high"), kept, strict=True)),
        "rows": which,
        "examples": len(rows),
    }


def rounding_line(kind: str, found: dict[str, Any]) -> str:
    """For a person."""
    losses, kept = found["losses"], found["kept"]
    said = (
        f"loss of {found['rows']} rows: base {losses['base']:.4f}, base + adapter {losses['adapter']:.4f}, in {kind} "
    )
    said += f"{losses['exported']:.4f}: "
    if kept["share"] is None:
        return said + "these rows do not show for sure that base + adapter are better than the base"
    interval = "" if kept["low"] is None else f" (95 % interval {kept['low']:.0%} to {kept['high']:.0%})"
    return f"{said}{kind} keeps {kept['share']:.0%} of what was learned{interval}"


def _why_not(file: Path) -> str | None:
    try:
        stored = stored_tensors(find_base(str(file)).folder)
    except LoraError as error:
        return f"the file cannot be opened here: {error.what}"
    widest = max((each.shape[0] for each in stored.values() if len(each.shape) == 2), default=0)
    return None if fits_in_fp32(parameters_stored(stored), widest) else "too little memory for it in fp32"
