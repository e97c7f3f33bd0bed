"""The one way to print: names and texts of files come out as they are, and do nothing to a terminal.

A string, wherever rich takes one (a line, a cell, a heading, a title), is foreign text: no markup, no emoji codes, and
what a terminal would act on is spelled out. Our own styles are Text and Style objects. streams.py guards what is below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lora_cli.errors import UNSEEN, escaped, from_here
from lora_cli.streams import wrapped


class Screen(Console):
    """rich's console for text from anywhere. stderr=True for what is said to people, else the result on stdout."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """What comes as a Text is caught here, after it was laid out."""
        for segment in super().render(renderable, options):
            if segment.control or not UNSEEN.search(segment.text):
                yield segment
            else:
                lines = segment.text.split("\n")
                yield Segment("\n".join(map(escaped, lines)), segment.style)

    def on_broken_pipe(self) -> None:
        """Only of a result: nobody reads on, so there is nothing left to do."""
        self.quiet = True
        raise BrokenPipeError


def styled(text: str, style: str = "") -> Text:
    """Foreign text in a style of ours."""
    return Text(escaped(text), style)


def say_on(console: Console) -> Callable[[str], None]:
    """A function that prints one line on the console; on a terminal, lines of whole words below its first column."""

    def say(text: str) -> None:
        line = escaped(from_here(text))
        for part in wrapped(line, console.width) if console.is_terminal else [line]:
            console.print(part, markup=False, emoji=False, highlight=False, soft_wrap=True)

    return say


def fits(table: Table, console: Console) -> bool:
    """Whether the table has room on this terminal without cutting a word; in a file it always has."""
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).minimum
    return needed <= console.width or not console.is_terminal


@contextmanager
def status(console: Console, what: str) -> Iterator[None]:
    """Shows what is being done, where somebody watches."""
    if not console.is_terminal or console.quiet:
        yield
        return
    shown = console.status(styled(what))
    with suppress(RuntimeError):  # no more threads can be started
        shown.start()
    try:
        yield
    finally:
        shown.stop()
