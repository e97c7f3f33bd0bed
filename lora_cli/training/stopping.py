"""How a run is asked to end early: by a signal, or because its time is up."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.ending import SIGHUP, listen_anew, note_signal, resend_lost_interrupt

_HANG_UP = 1  # SIGHUP, also on Windows, which has none
# The most urgent first: each of several processes may have received another signal.
EXIT_CODES = (128 + signal.SIGTERM, 128 + _HANG_UP, 128 + signal.SIGINT)
_SAME_REQUEST_SECONDS = 5.0


class Stop:
    """First Ctrl+C, SIGTERM or SIGHUP: end after this step. Second: end at once. max_seconds: end before they are over.

    A closed terminal sends SIGHUP more than once, and whatever closes it may send SIGTERM as well: neither counts as a
    second request. Where SIGHUP is ignored, as under nohup, it stays ignored.

    Before the first step there is nothing to lose, so there the first signal ends the run at once, too. Several
    processes must end after the same step: each notes its own signals, and the loop shares them.
    """

    def __init__(self, say: Callable[[str], None], *, max_seconds: float | None, processes: int):
        self.say, self.max_seconds, self.processes = say, max_seconds, processes
        self.began = time.monotonic()
        self.why: str | None = None
        self.exit_code = 130
        self.in_steps = False
        self.first: int | None = None  # the first signal within the steps, and when
        self._first_at = 0.0
        self._longest_step = 0.0

    @property
    def requested(self) -> bool:
        return self.why is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        listen_anew()
        heard = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
            heard.append(SIGHUP)
        before = {each: signal.signal(each, self._on_signal) for each in heard}
        hook, sys.unraisablehook = sys.unraisablehook, resend_lost_interrupt
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for each, handler in before.items():
                signal.signal(each, handler)

    def ask(self, why: str, exit_code: int) -> None:
        """End after this step; the first reason given is kept."""
        if self.why is None:
            self.why, self.exit_code = why, exit_code

    def watch_the_clock(self, step_seconds: float) -> None:
        """After each step and what follows it: ask to end if another step and a checkpoint would take too long."""
        self._longest_step = max(self._longest_step, step_seconds)
        if self.max_seconds is None or self.requested:
            return
        if time.monotonic() - self.began + 2 * self._longest_step > self.max_seconds:
            self.say(f"the {self.max_seconds / 3600:g} hours are nearly up: writing a checkpoint")
            self.ask("its time was up", 130)

    def wait(self, seconds: float) -> None:
        """Return when the time has passed, or the run is asked to end."""
        until = time.monotonic() + seconds
        while not self.requested and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _on_signal(self, number: int, _frame: Any) -> None:
        if not note_signal(number):
            return
        name = signal.Signals(number).name
        if not self.in_steps:
            self.ask(f"it received {name} before its first step", 128 + number)
            raise KeyboardInterrupt
        if self.first is not None:
            if self._is_the_same_request(number):
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.first, self._first_at = number, time.monotonic()
        self.ask(f"it received {name}", 128 + number)
        self.say(f"{name}: finishing this step, then writing a checkpoint; a second signal stops at once")
        if self.processes == 1 and number != SIGHUP:
            for each in (signal.SIGINT, signal.SIGTERM):  # the system's own handler ends a long computation, too
                signal.signal(each, signal.SIG_DFL)

    def _is_the_same_request(self, number: int) -> bool:
        soon = time.monotonic() - self._first_at < _SAME_REQUEST_SECONDS
        if self.processes > 1:  # a launcher passes on what its processes got already
            return soon or number == signal.SIGTERM
        return soon and self.first == SIGHUP and number == signal.SIGTERM
