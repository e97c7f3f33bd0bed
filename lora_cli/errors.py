"""Errors a person reads: what happened, where, how to fix it."""

from __future__ import annotations

import re

# What a terminal acts on instead of showing it: control characters, halves of characters, line ends other than \n, and
# marks that turn the direction of writing. They come in by names and values of files.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 800  # characters; of a longer one the beginning and the end are shown
_MOST_PROBLEMS = 50


class LoraError(Exception):
    """A mistake the user can mend. Shown without a traceback; the command exits with `exit_code` 2.

    what: one sentence, what happened. where: file, line, row, layer. fix: what to do about it.
    details: further lines, such as the list of names that do exist.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, details: list[str] | None = None
    ):
        self.what, self.where, self.fix, self.details = what, where, fix, details or []
        super().__init__(self.render())

    def render(self) -> str:
        head = f"error: {self.where}: {self.what}" if self.where else f"error: {self.what}"
        lines = [head, *(f"  {line}" for line in self.details)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(map(_shown, lines))


class RecipeErrors(LoraError):
    """Every problem of a recipe, reported together."""

    def __init__(self, problems: list[LoraError]):
        self.problems = problems
        super().__init__(f"{len(problems)} problems in the recipe")

    def render(self) -> str:
        shown = [problem.render() for problem in self.problems[:_MOST_PROBLEMS]]
        if more := len(self.problems) - len(shown):
            shown.append(LoraError(f"{more:,} more problems", fix="mend those above first").render())
        return "\n".join(shown)


class CheckFailed(LoraError):
    """A check that protects the result said no, for example a run that learned nothing. Exit code 3."""

    exit_code = 3


class DiskError(LoraError):
    """A place that cannot be written: full, read-only, broken. What was there before is intact."""


class Interrupted(LoraError):
    """A run was asked to stop, and can be resumed. Exit code 128 + signal: 130 for Ctrl+C, 143 for SIGTERM."""

    def __init__(self, what: str, *, exit_code: int = 130, where: str | None = None, fix: str | None = None):
        self.exit_code = exit_code
        super().__init__(what, where=where, fix=fix)


class ProcessLost(LoraError):
    """Another process of this run ended, so this one cannot go on. Exit code 1."""

    exit_code = 1


def _shown(line: str) -> str:
    """One line that any terminal shows as it is."""
    if len(line) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        line = f"{line[:half]} … {line[-half:]}"
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], line)
