"""What a run says of itself at its end: report.json, and a few lines for the person who waited."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lora_cli.adapters.attach import adapter_parameters, is_inert
from lora_cli.errors import CheckFailed
from lora_cli.files import human_bytes, write_json
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.session import Session
from lora_cli.training.state import State


def make_report(session: Session, state: State, folder: RunFolder) -> dict[str, Any]:
    return {
        "steps": state.step,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        "base_validation_loss": state.base_validation_loss,
        "best_validation_loss": state.best_validation_loss,
        "best_step": state.best_step,
        "last_validation_loss": state.last_validation_loss,
        "tokens": state.tokens,
        "target_tokens": state.target_tokens,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "peak_memory_bytes": state.peak_memory_bytes,
        "skipped_steps": state.skipped,
        "rewound_from_steps": [step for step, _ in state.rewound],
        "adapted_layers": len(session.layers),
        "trained_parameters": sum(parameter.numel() for parameter in adapter_parameters(session.model)),
        "learned": not is_inert(session.model),
        "adapter": str(folder.adapter),
    }


def write_report(folder: RunFolder, report: dict[str, Any]) -> None:
    write_json(folder.report, report)


def require_learned(report: dict[str, Any], folder: RunFolder) -> None:
    if not report["learned"]:
        raise CheckFailed(
            "this run learned nothing: every B of the adapter is still zero",
            where=str(folder.path),
            fix="raise train.learning_rate; with one step and a warm-up the rate may have been too small to count",
        )


def say_result(report: dict[str, Any], say: Callable[[str], None]) -> None:
    if report["best_validation_loss"] is not None:
        before, after = report["base_validation_loss"], report["best_validation_loss"]
        change = 1 - math.exp(after - before)
        say(
            f"validation perplexity {math.exp(min(before, 80)):.2f} → {math.exp(min(after, 80)):.2f} "
            f"({abs(change):.0%} {'lower' if change >= 0 else 'higher'}; best at step {report['best_step']})"
        )
    minutes, seconds = divmod(round(report["seconds"]), 60)
    say(
        f"{report['steps']} steps in {minutes}:{seconds:02d}, {report['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {human_bytes(report['peak_memory_bytes'])}"
    )
    say(f"adapter in {report['adapter']}")
