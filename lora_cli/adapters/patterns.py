"""Which modules a pattern means, found within limits: some regular expressions would take years, or all memory."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import regex

from lora_cli import limits

_QUICK_SECONDS = 0.05  # an honest pattern on the names of the largest model
_slow_seconds = 0.0  # that patterns took beyond that so far


class BadPattern(ValueError):
    """A text that is not a regular expression, or one that cannot be tried on the names in reasonable time."""


def matching(pattern: str, names: Sequence[str], *, literal: bool = True) -> list[str]:
    """The names that a regular expression matches in full; with `literal` also names and last parts of names as such.

    Raises BadPattern.
    """
    hit = {name for name in names if literal and (name == pattern or name.endswith(f".{pattern}"))}
    _require_modest(pattern)
    global _slow_seconds  # noqa: PLW0603 - a file may hold many patterns, each of them just quick enough
    began = time.monotonic()
    seconds = min(limits.PATTERN_SECONDS, limits.PATTERNS_SECONDS - _slow_seconds)
    try:
        compiled = regex.compile(pattern)
        for name in names:
            if name not in hit and compiled.fullmatch(name, timeout=max(began + seconds - time.monotonic(), 1e-3)):
                hit.add(name)
    except regex.error as error:
        raise BadPattern(f"is not a valid regular expression: {error}") from None
    except RecursionError:
        raise BadPattern("is not a valid regular expression: nested too deeply") from None
    except (TimeoutError, MemoryError):
        _slow_seconds = 0.0
        raise BadPattern(f"takes more than {seconds:.0f} s to match; repetitions inside repetitions do that") from None
    _slow_seconds += max(0.0, time.monotonic() - began - _QUICK_SECONDS)
    return [name for name in names if name in hit]


def _require_modest(pattern: str) -> None:
    """Compiling has no limit of time, so what makes it long is looked for in the text."""
    if len(pattern) > limits.PATTERN_CHARACTERS:
        raise BadPattern(f"has {len(pattern):,} characters; {limits.PATTERN_CHARACTERS:,} is the limit. Write a list")
    if re.search(r"\(\?(?:R|[0-9&]|[+-][0-9]|P>)", pattern):
        raise BadPattern("contains itself, as (?R) or (?1)")
    repeats = 1
    for counts in re.findall(r"\{([0-9]*,?[0-9]*)\}", pattern):
        repeats *= max(1, *(int(count[:9] or 1) for count in counts.split(",")))
        if repeats > limits.PATTERN_REPEATS:
            raise BadPattern(f"repeats more than {limits.PATTERN_REPEATS:,} times; write * or +")
