"""What a person sees during a run: a live display on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lora_cli.files import human_bytes
from lora_cli.screen import say_on, styled
from lora_cli.training.verdict import duration, perplexity

_PLAIN_EVERY_SECONDS = 5.0
_WIDTH = 30


class Progress:
    """Shows steps as they end. Use as a context manager around the loop."""

    def __init__(self, console: Console, total_steps: int, first_step: int):
        self.console, self.total, self.first = console, total_steps, first_step
        self.say = say_on(console)
        self.started = time.monotonic()
        self.last_plain = -math.inf
        self.line: dict[str, Any] = {}
        self.validation: tuple[int, float] | None = None
        self.activity = ""
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
            try:
                live.start()
                self.live = live
            except RuntimeError:  # no more threads can be started
                live.stop()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def doing(self, activity: str) -> None:
        """Show what happens between steps, such as an evaluation."""
        self.activity = activity

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.first:  # the time before, such as of evaluating the base, is not a step's
            self.started = time.monotonic() - line["seconds"]
        self.line, self.activity = line, ""
        validation = line.get("validation_loss")
        if validation is not None:
            self.validation = (line["step"], validation)
        now = time.monotonic()
        due = line["step"] in (self.first, self.total) or now - self.last_plain > _PLAIN_EVERY_SECONDS
        if validation is not None or (due and self.live is None):
            self.last_plain = now
            self.say(self._plain())

    def _plain(self) -> str:
        line = self.line
        parts = [
            f"step {line['step']}/{self.total}",
            "loss is NaN or infinite" if line["loss"] is None else f"loss {line['loss']:.4f}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            human_bytes(line["peak_memory_bytes"]),
            f"{self._remaining()} left",
        ]
        if "validation_loss" in line:
            loss = line["validation_loss"]
            parts.insert(2, f"validation {loss:.4f} (perplexity {perplexity(loss)})")
        return "  ".join(parts)

    def _remaining(self) -> str:
        done = self.line["step"] - self.first + 1
        seconds = (time.monotonic() - self.started) / max(1, done) * (self.total - self.line["step"])
        return duration(seconds)

    def _render(self) -> Group | Text:
        if not self.line:
            return styled(f"  {self.activity or 'first step'} …")
        filled = round(_WIDTH * self.line["step"] / self.total)
        lines = [Text("━" * filled, "green") + Text("━" * (_WIDTH - filled), "dim"), styled(self._plain())]
        if self.validation:
            lines.append(styled("validation loss {1:.4f} at step {0}".format(*self.validation)))
        if self.activity:
            lines.append(styled(f"{self.activity} …", "dim"))
        return Group(*lines)
