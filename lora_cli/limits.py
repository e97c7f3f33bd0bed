"""Every limit on what comes from strangers, each with its reason. Reaching one is an error in words, in seconds.

A limit lies far above what honest files need (the largest that we know is named) and far below what a machine can take:
no refusal takes 10 s or 1 GB.
"""

from __future__ import annotations

from lora_cli.errors import LoraError

# ── chat templates (data/jinja.py) ──────────────────────────────────────────────────────────────────────────────
# A step is one round of a loop, one call, one operation, or 32 characters of text. The templates of well-known models
# take 5 to 40 steps a turn. Steps are counted, not timed, so a row is refused on every machine or on none.
TEMPLATE_CHARACTERS = 128 << 10  # the longest known, gpt-oss, has 17,000; compiling as much as this takes 2 to 4 s
TEMPLATE_STEPS = 200_000  # for any row, about 0.1 s …
TEMPLATE_STEPS_PER_STEP_OF_INPUT = 1_000  # … and more for a long one: a few templates go through all turns at each turn
TEMPLATE_MOST_STEPS = 10_000_000  # but never more: 3 to 8 s, and 320 million characters
TEMPLATE_SECONDS = 8.0  # for a machine on which steps take longer
TEMPLATE_WIDTH = 10_000  # of a number that sets how long a text becomes: center(width), '%200d', tojson(indent=4)
TEMPLATE_BITS = 1 << 17  # of a whole number: 10**10**10 has 33 billion


class LimitReached(LoraError):
    """Foreign input asked for more than a limit allows. It stops a run, also where other faults of a row are findings:
    every further row might take as long."""
