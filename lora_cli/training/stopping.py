"""How a run is asked to end early: by a signal, or because its time is up."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGTERM_CODE = 128 + signal.SIGTERM
_SAME_REQUEST_SECONDS = 5.0  # a launcher passes a signal on that its processes got already


class Stop:
    """First Ctrl+C or SIGTERM: end after this step. Second: end at once. max_seconds: end before that much has passed.

    Before the first step there is nothing to lose, so there the first ends the run at once, too. Several processes
    must end after the same step: each knows of its own signals, and the loop tells them of each other's.
    """

    def __init__(self, say: Callable[[str], None], *, max_seconds: float | None, processes: int):
        self.say, self.max_seconds, self.processes = say, max_seconds, processes
        self.began = time.monotonic()
        self.why: str | None = None
        self.exit_code = 130
        self.in_steps = False
        self._asked = 0.0
        self._longest_step = 0.0

    @property
    def requested(self) -> bool:
        return self.why is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {each: signal.signal(each, self._on_signal) for each in (signal.SIGINT, signal.SIGTERM)}
        hook, sys.unraisablehook = sys.unraisablehook, self._on_lost_error
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for each, handler in before.items():
                signal.signal(each, handler)

    def ask(self, why: str, exit_code: int) -> None:
        """End after this step; the first reason stands."""
        if self.why is None:
            self.why, self.exit_code, self._asked = why, exit_code, time.monotonic()

    def watch_the_clock(self, step_seconds: float) -> None:
        """After a step, with all that followed it: whether another one, and a checkpoint, can still end in time."""
        self._longest_step = max(self._longest_step, step_seconds)
        if self.max_seconds is None or self.requested:
            return
        if time.monotonic() - self.began + 2 * self._longest_step > self.max_seconds:
            self.say(f"the {self.max_seconds / 3600:g} hours are nearly up: writing a checkpoint")
            self.ask("its time was up", 130)

    def wait(self, seconds: float) -> None:
        """Until the time has passed, or an end is asked for."""
        until = time.monotonic() + seconds
        while not self.requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _on_lost_error(self, lost: Any) -> None:
        """Python drops what is raised in a finalizer, and a signal may come just there: so once more, in a moment."""
        if isinstance(lost.exc_value, KeyboardInterrupt) and self.requested and not self.in_steps:
            threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,)).start()
        else:
            sys.__unraisablehook__(lost)

    def _on_signal(self, number: int, _frame: Any) -> None:
        name = signal.Signals(number).name
        if not self.in_steps:
            self.ask(f"it got {name} before its first step", 128 + number)
            raise KeyboardInterrupt
        if self.requested:
            passed_on = number == signal.SIGTERM or time.monotonic() - self._asked < _SAME_REQUEST_SECONDS
            if self.processes > 1 and passed_on:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.ask(f"it got {name}", 128 + number)
        self.say(f"{name}: finishing this step, then writing a checkpoint; once more stops at once")
        if self.processes == 1:  # also in the middle of a long computation, where no handler of Python's runs
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
