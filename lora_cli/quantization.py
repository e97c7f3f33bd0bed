"""The ways of holding a base that a recipe can name, and which settings go with each. They are in base/storage/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Quantization = Literal["nf4", "int8", "int4", "gguf", "none"]
DEFAULT: Quantization = "nf4"


@dataclass(frozen=True)
class Rules:
    """double, groups: whether double_quantization and group_size mean something. not_sharded: why shard_base is
    refused; None: it is not. written: whether a merged model can be written so. of_file: whether it is what a GGUF file
    holds, and can be made of no other base."""

    double: bool = False
    groups: bool = False
    written: bool = False
    of_file: bool = False
    not_sharded: str | None = None


RULES: dict[str, Rules] = {
    "nf4": Rules(double=True, written=True),
    "int8": Rules(
        not_sharded="bitsandbytes keeps 8-bit weights outside the parameter, where they cannot be spread over processes"
    ),
    "int4": Rules(groups=True),
    "gguf": Rules(of_file=True),
    "none": Rules(),
}


def named(which: Callable[[Rules], bool]) -> str:
    """Those that `which` holds for, as a message lists them."""
    return " or ".join(name for name, rules in RULES.items() if which(rules))
