"""Which modules a pattern means, found within a limit of time: some regular expressions would search for years."""

from __future__ import annotations

import time
from collections.abc import Sequence

import regex

_SECONDS = 2.0  # for all names together; an honest pattern takes microseconds


class BadPattern(ValueError):
    """A text that is no regular expression, or one that cannot be tried on the names in reasonable time."""


def matching(pattern: str, names: Sequence[str], *, literal: bool = True) -> list[str]:
    """The names that a regular expression matches in full; with `literal` also names and last parts of names as such.

    Raises BadPattern.
    """
    hit = {name for name in names if literal and (name == pattern or name.endswith(f".{pattern}"))}
    ends = time.monotonic() + _SECONDS
    try:
        compiled = regex.compile(pattern)
        for name in names:
            if name not in hit and compiled.fullmatch(name, timeout=max(ends - time.monotonic(), 1e-3)):
                hit.add(name)
    except regex.error as error:
        raise BadPattern(f"is not a valid regular expression: {error}") from None
    except RecursionError:
        raise BadPattern("is not a valid regular expression: nested too deeply") from None
    except TimeoutError:
        raise BadPattern(f"takes more than {_SECONDS:.0f} s to match; repetitions inside repetitions do that") from None
    return [name for name in names if name in hit]
