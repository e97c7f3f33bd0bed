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
_WIDTH, _LEAST_BAR = 30, 10  # columns


class Progress:
    """Shows steps as they end. Use as a context manager around the loop."""

    def __init__(self, console: Console, total_steps: int, first_step: int, epochs: float | None = None):
        """epochs: how many all steps are, where that is known."""
        self.console, self.total, self.first, self.epochs = console, total_steps, first_step, epochs
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
                live.start(refresh=True)  # else a line that is said before the first frame may come out behind it
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
            self.say(self._plain(self.console.width if self.console.is_terminal else None, validation))

    def _plain(self, width: int | None, validation: float | None) -> str:
        """The step in one line; of `width` columns, where that is given, without what matters less and does not fit."""
        line, of_all = self.line, self.line["step"] / self.total
        loss = line["loss"]
        parts = [  # (how much it matters, text)
            (0, f"step {line['step']}/{self.total}"),
            (3, f"{of_all:.0%}"),
            (6, "" if self.epochs is None else f"epoch {self.epochs * of_all:.2f}"),
            (1, "loss is NaN or infinite" if loss is None else f"loss {loss:.4f}"),
            (2, "" if validation is None else f"validation {validation:.4f}"),
            (5, "" if validation is None else f"perplexity {perplexity(validation)}"),
            (7, f"rate {line['learning_rate']:.1e}"),
            (8, f"{line['tokens_per_second']:,.0f} tokens/s"),
            (9, human_bytes(line["peak_memory_bytes"])),
            (4, f"{self._remaining()} left"),
        ]
        parts = [(rank, text) for rank, text in parts if text]
        while width is not None and len(parts) > 1 and len(_joined(parts)) > width:
            parts.remove(max(parts))
        return _joined(parts)

    def _remaining(self) -> str:
        done = self.line["step"] - self.first + 1
        seconds = (time.monotonic() - self.started) / max(1, done) * (self.total - self.line["step"])
        return duration(seconds)

    def _render(self) -> Group | Text:
        if not self.line:
            return styled(f"  {self.activity or 'first step'} …")
        text = self._plain(self.console.width - _LEAST_BAR - 2, validation=None)
        bar = max(1, min(_WIDTH, self.console.width - len(text) - 2))
        filled = round(bar * self.line["step"] / self.total)
        lines = [Text.assemble(("━" * filled, "green"), ("━" * (bar - filled), "dim"), "  ", styled(text))]
        if self.validation:
            lines.append(styled("validation loss {1:.4f} at step {0}".format(*self.validation)))
        if self.activity:
            lines.append(styled(f"{self.activity} …", "dim"))
        return Group(*lines)


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)
