"""Errors a person reads: what happened, where, how to fix it. And what other people's code raises, turned into them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Characters that a terminal interprets and does not show: controls, marks that turn the direction of writing, those
# without a shape that hide text, lone surrogates. Found in the names and contents of files.
_CONTROLS, _DIRECTIONS = "\x00-\x1f\x7f-\x9f", "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_SHAPELESS = "\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_UNSEEN = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_SHAPELESS}\u2028\u2029\ud800-\udfff]")
UNSEEN = re.compile(f"(?!\n){_UNSEEN.pattern}")  # in text of several lines
_LONGEST_LINE = 800  # characters; of a longer one the beginning and the end are shown
_LONGEST_FIX = 5000  # it may hold a command with a path, which cannot be pasted when it is cut
_MOST_PROBLEMS = 50
Place = str | os.PathLike[str]


class LoraError(Exception):
    """A mistake that the user can fix. Shown without a traceback; the command exits with `exit_code` 2.

    what: one sentence, what happened. where: file, line, row, layer. fix: what to do about it.
    details: further lines, such as the list of names that do exist.
    """

    exit_code = 2
    result: dict[str, Any] | None = None  # what was computed all the same; --json prints it beside the error

    def __init__(
        self, what: str, *, where: Place | None = None, fix: str | None = None, details: list[str] | None = None
    ):
        self.where = None if where is None else os.fspath(where)
        self.what, self.fix, self.details = what, fix, details or []
        super().__init__(self.render())

    def render(self) -> str:
        head = f"error: {self.where}: {self.what}" if self.where else f"error: {self.what}"
        lines = [shown(line) for line in (head, *(f"  {line}" for line in self.details))]
        if self.fix:
            lines.append(shown(f"  fix: {self.fix}", _LONGEST_FIX))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For --json, under the key `error`."""
        return {name: getattr(self, name) for name in ("what", "where", "fix", "details", "exit_code")}


class RecipeErrors(LoraError):
    """Every problem of a recipe, or of another file, reported together."""

    def __init__(self, problems: list[LoraError], file: str = "the recipe"):
        self.problems = problems
        super().__init__(f"{len(problems)} problems in {file}")
        self.details = [problem.render() for problem in problems[:_MOST_PROBLEMS]]

    def render(self) -> str:
        lines = [problem.render() for problem in self.problems[:_MOST_PROBLEMS]]
        if more := len(self.problems) - len(lines):
            lines.append(LoraError(f"{more:,} more problems", fix="fix those above first").render())
        return "\n".join(lines)


class CheckFailed(LoraError):
    """A check that protects the result said no, for example a run that learned nothing. Exit code 3."""

    exit_code = 3


class DiskError(LoraError):
    """A place that cannot be written: full, read-only, broken. What was there before is intact."""


class Interrupted(LoraError):
    """A run was asked to stop, and can be resumed. Exit code 128 + signal: 130 for Ctrl+C, 143 for SIGTERM, 129 for
    SIGHUP."""

    def __init__(self, what: str, *, exit_code: int = 130, where: Place | None = None, fix: str | None = None):
        self.exit_code = exit_code
        super().__init__(what, where=where, fix=fix)

    def render(self) -> str:
        """Without "error": it was asked for."""
        return super().render().removeprefix("error: ")


class ProcessLost(LoraError):
    """Another process of this run ended, so this one cannot go on. Exit code 1."""

    exit_code = 1


class Unexpected(LoraError):
    """A mistake of this program, or of a library it uses. Exit code 1."""

    exit_code = 1


def refuse_if(wrong: bool, what: str, *, fix: str, where: Place | None = None) -> None:
    """Raises LoraError, such as for options that contradict each other."""
    if wrong:
        raise LoraError(what, where=where, fix=fix)


@contextmanager
def reading(what: str, where: Place | None = None, fix: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises inside this block into a LoraError: `what`, the library's reason, where and fix.

    For reading what comes from others: a model's configuration, a tokenizer, a template, weights, data, an adapter, a
    run folder. A damaged file can make a library raise anything: RecursionError, OverflowError, MemoryError, and the
    tokenizers library PanicException, which does not inherit from Exception. LoraErrors pass as they are, and so do
    Ctrl+C and SystemExit.
    """
    try:
        yield
    except LoraError:
        raise
    except BaseException as error:
        if not is_error(error):
            raise
        raise LoraError(f"{what}: {reason_of(error)}", where=where, fix=fix) from error


def is_error(raised: BaseException) -> bool:
    """Whether this is an error and not a request to end. A panic in Rust code is a BaseException."""
    return isinstance(raised, Exception) or type(raised).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing that is a sentence."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start:,}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        said = str(error).strip()
    except Exception:  # an exception whose own text cannot be made
        said = ""
    if len(said.split()) < 2:  # such as KeyError's, which is the key alone
        said = f"{type(error).__name__}: {said}"
    return said.splitlines()[0][:300].rstrip(": ")


def home_expanded(path: str) -> str:
    """A path with ~ or ~user at its start written out. Raises LoraError where that home folder is not known.

    Left as it is, it would make a folder whose name begins with ~.
    """
    expanded = os.path.expanduser(path)
    if not expanded.startswith("~"):
        return expanded
    user = path.partition("/")[0]
    what = f"there is no user {user[1:]} here" if user != "~" else "the home folder is not known, as HOME is not set"
    raise LoraError(what, where=path, fix=f"write the whole path; for a folder of that name write ./{user}")


def command(*words: str | os.PathLike[str]) -> str:
    """A command line that can be pasted into a shell as it is, whatever the words hold."""
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if not _UNSEEN.search(word):
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    as_bytes = _UNSEEN.sub(
        lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode(errors="surrogateescape")), plain
    )
    return f"$'{as_bytes}'"  # as bash, zsh and POSIX 2024 read it


def shown(line: str, longest: int = _LONGEST_LINE) -> str:
    """One line that any terminal shows as it is; of a very long one the beginning and the end."""
    if len(line) > longest:
        line = f"{line[: longest // 2]} … {line[-longest // 2 :]}"
    return escaped(line)


def from_here(text: str) -> str:
    """The text with paths below the current folder as one writes them there: without what leads to it."""
    try:
        here = os.getcwd().rstrip(os.sep)
    except OSError:  # it was removed
        return text
    if not here:
        return text
    start = rf"(?<![^\s'\"(=]){re.escape(here + os.sep)}(?=[^\s'\"-])"
    if _quoted(here) != here:  # what was quoted for the sake of this part alone
        text = re.sub(rf"(?<!\S)'{start}([\w@%+=:,./-]+)'", r"\1", text, flags=re.ASCII)
    return re.sub(start, "", text)


def escaped(line: str) -> str:
    """The line with everything spelled out that a terminal would act on, line ends too: \\x1b for an escape."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], line)


def shortened(text: str, most: int) -> str:
    """The text in at most so many characters, with a mark where its middle is left out."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
