"""stdout and stderr that survive: a reader that left, a full disk, a closed descriptor, a terminal that knows ASCII.

What is said on stderr is said to people, and never ends or fails a run: where it cannot be written it is dropped. What
is printed on stdout is the result: where it cannot be written the command fails. Imports nothing heavy.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import select
import shutil
import sys
import textwrap
from typing import Any, NoReturn

from lora_cli.errors import UNSEEN, LoraError, escaped, from_here
from lora_cli.files import finite

_PATIENCE_SECONDS = 5.0  # for a reader of stderr that does not read: a stopped terminal, a pager
_NARROWEST = 40  # columns of a terminal in which lines are wrapped
_PIECE_BYTES = 4096  # what a pipe that can be written takes at once on every system

# For terminals that do not know them. What is not here is shown as its number.
_STAND_INS = {
    "→": "->", "−": "-", "↵": "\\n", "⇥": "\\t", "␡": "\\x7f", "…": "...", "–": "-", "—": "-", "·": "-", "×": "x",
    "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "━": "=", "─": "-", "│": "|", "⟦": "[[", "⟧": "]]", "✓": "ok",
    "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip
_STAND_INS |= {chr(0x2400 + at): ascii(chr(at))[1:-1] for at in range(32)}  # the pictures of control characters
_STAND_INS |= {chr(0x2800 + at): "*" for at in range(256)}  # the spinner is made of braille


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    plain = [_STAND_INS.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lost]
    return "".join(plain), error.end


codecs.register_error("lora.stand_in", _stand_in)


def guard_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that survive. Streams of no file descriptor stay, as in tests."""
    closed = {name for name in ("stdout", "stderr") if getattr(sys, name) is None}
    _fill_closed_descriptors()
    for name, descriptor, kind in (("stdout", 1, _Results), ("stderr", 2, _Notes)):
        stream = getattr(sys, name)
        try:
            if name not in closed and stream.fileno() != descriptor:
                continue
        except (AttributeError, OSError, ValueError):
            continue
        if os.name == "nt" and name not in closed and stream.isatty():  # a console there takes no bytes
            stream.reconfigure(errors="lora.stand_in")
            continue
        raw = kind(descriptor, "w", closefd=False)
        raw.lost = name in closed
        if stream is not None:
            stream.flush()
        guarded: Any = io.TextIOWrapper(
            raw,  # type: ignore[arg-type]  # without a buffer between, as python -u does: a signal's handler may write too
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="lora.stand_in",
            line_buffering=name == "stderr" or raw.isatty(),
            write_through=name == "stderr",
        )
        guarded.mode = "w"
        setattr(sys, name, guarded)


def print_result(text: str) -> None:
    """One line of a result on stdout, with nothing in it that a terminal acts on. Raises LoraError if it is lost."""
    _print_lines([escaped(text)], sys.stdout)


def print_json(value: Any) -> None:
    """One document on stdout, in ASCII, which no terminal can misread; numbers that JSON does not have are null."""
    print(json.dumps(finite(value), allow_nan=False))


def print_piece(text: str) -> None:
    """A piece of what a model wrote: as it is into a file or a pipe; on a terminal nothing of it is acted on."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = UNSEEN.sub(lambda found: found[0] if found[0] == "\t" else escaped(found[0]), text)
        text = _streamed.laid_out(text, shutil.get_terminal_size().columns)
    print(text, end="", flush=True)


def print_note(text: str) -> None:
    """Lines for people on stderr, for what is said before or after rich is there."""
    if sys.stderr is not None:
        _print_lines([escaped(line) for line in from_here(text).split("\n")], sys.stderr)


def _print_lines(lines: list[str], stream: Any) -> None:
    if stream.isatty():
        lines = [part for line in lines for part in wrapped(line, shutil.get_terminal_size().columns)]
    print("\n".join(lines), file=stream, flush=stream is sys.stderr)


def wrapped(line: str, width: int) -> list[str]:
    """Lines of whole words in `width` columns, below the text that begins the line; a command as shells take it."""
    if len(line) <= width or width < _NARROWEST:
        return [line]
    start = re.match(r" *fix: |next: | *\S+(?: \S+)* {2,}(?=\S)| *", line)
    indent, blanks = len(start[0]) if start else 0, len(line) - len(line.lstrip())
    if indent > width // 3 or indent == blanks < 9:
        indent = blanks + 2
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    command = re.match(r"(?:next: | {6}| +fix: (?:.*: )?)lora ", line)
    lines = textwrap.wrap(line, width - 2 * bool(command), subsequent_indent=" " * indent, **how)
    begun = len(command[0]) if command else len(line)
    for at, each in enumerate(lines[:-1]):
        begun -= len(each) - indent * bool(at)
        lines[at] += " \\" if begun <= 0 else ""
    return lines


class _Streamed:
    """A text that comes in pieces, on a terminal: a word that reaches the edge is taken back into the next line."""

    def __init__(self) -> None:
        self.column, self.word = 0, ""

    def laid_out(self, text: str, width: int) -> str:
        from rich.cells import cell_len

        out = []
        for each in text:
            wide = 8 - self.column % 8 if each == "\t" else cell_len(each)
            if each == "\n":
                self.column, self.word = 0, ""
            elif self.column + wide >= width >= _NARROWEST:
                moved = self.word if each != " " and cell_len(self.word) < width // 2 else ""
                out.append(f"\x1b[{cell_len(moved)}D\x1b[K\n{moved}" if moved else "\n")
                self.column, self.word = cell_len(moved), moved
                if each == " ":
                    continue
            self.column += wide
            self.word = "" if each.isspace() else self.word + each
            out.append(each)
        return "".join(out)


_streamed = _Streamed()


def finish_results() -> None:
    """Hand on what stdout still holds. Raises LoraError, or BrokenPipeError for a reader that left."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _fill_closed_descriptors() -> None:
    """Let no file that is opened later become what libraries take for stdout or stderr, and write into."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


class _Notes(io.FileIO):
    """Takes everything, and writes what can be written."""

    lost = False
    _stuck = False

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left and not self.lost and self._can_be_written():
                left = left[super().write(left[:_PIECE_BYTES]) or 0 :]
        except OSError as error:
            self.lost = error.errno in (errno.EPIPE, errno.EBADF)  # a disk may have room again
        return size

    def _can_be_written(self) -> bool:
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        self._stuck = not poll.poll(0 if self._stuck else _PATIENCE_SECONDS * 1000)
        return not self._stuck


class _Results(io.FileIO):
    """Raises LoraError, once, when a result cannot be written; BrokenPipeError when nobody reads on."""

    lost = False
    _failed = False

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        if self._failed:
            return size
        if self.lost:
            self._fail("it is closed")
        try:
            while left:
                written = super().write(left)
                if written is None:  # set to not wait, by whoever shares the terminal
                    select.select([], [self.fileno()], [])
                left = left[written or 0 :]
        except BrokenPipeError:
            self._failed = True
            raise
        except OSError as error:
            self._fail(error.strerror or str(error))
        return size

    def _fail(self, why: str) -> NoReturn:
        self._failed = True
        fix = "send it to a terminal, a pipe, or a disk with room"
        raise LoraError(f"the result cannot be written: {why}", where="stdout", fix=fix) from None
