"""Errors a person reads: what happened, where, how to fix it."""

from __future__ import annotations


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
        return "\n".join(lines)


class RecipeErrors(LoraError):
    """Every problem of a recipe, reported together."""

    def __init__(self, problems: list[LoraError]):
        self.problems = problems
        super().__init__(f"{len(problems)} problems in the recipe")

    def render(self) -> str:
        return "\n".join(problem.render() for problem in self.problems)


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
