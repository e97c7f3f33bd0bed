"""Every limit on what comes from strangers, each with its reason. Reaching one is an error in words, in seconds.

A limit lies far above what honest files need (the largest that we know is named) and far below what a machine can take:
no refusal takes 10 s or 1 GB.
"""

from __future__ import annotations

from pathlib import Path

from lora_cli.errors import LoraError

# ── chat templates (data/chat/jinja.py) ──────────────────────────────────────────────────────────────────────────────
# A step is one round of a loop, one call, one operation, or 32 characters of text. The templates of well-known models
# take 5 to 40 steps a turn. Steps are counted, not timed, so a row is refused on every machine or on none.
TEMPLATE_CHARACTERS = 128 << 10  # the longest known, gpt-oss, has 17,000; compiling as much as this takes 2 to 4 s
TEMPLATE_STEPS = 200_000  # for any row, about 0.1 s …
TEMPLATE_STEPS_PER_STEP_OF_INPUT = 1_000  # … and more for a long one: a few templates go through all turns at each turn
TEMPLATE_MOST_STEPS = 10_000_000  # but never more: 3 to 8 s, and 320 million characters
TEMPLATE_SECONDS = 8.0  # for a machine on which steps take longer
TEMPLATE_WIDTH = 10_000  # of a number that sets how long a text becomes: center(width), '%200d', tojson(indent=4)
TEMPLATE_BITS = 1 << 17  # of a whole number: 10**10**10 has 33 billion


# ── recipes (recipe/yaml.py) ────────────────────────────────────────────────────────────────────────────────────
RECIPE_BYTES = 256 << 10  # every layer of the largest models can be named in that
RECIPE_LEVELS = 16  # sections, lists and values inside each other; the deepest setting has 4
RECIPE_VALUES = 10_000  # keys and values; the largest model known has 7,000 layers that can be named
RECIPE_DIGITS = 100  # of a value that YAML reads as a number or date
RECIPE_SUGGESTIONS = 100  # problems for which a similar key is looked for; 50 are shown

# ── regular expressions (adapters/patterns.py) ──────────────────────────────────────────────────────────────────
PATTERN_CHARACTERS = 10_000  # 100 names joined by | have 3,000
PATTERN_REPEATS = 1_000  # all counts such as {1,3} multiplied: they are written out when a pattern is compiled
PATTERN_SECONDS = 2.0  # for one pattern on all names together; an honest one takes microseconds
PATTERNS_SECONDS = 6.0  # for all patterns of one file

# ── models (base/bounds.py, base/weight_files.py) ───────────────────────────────────────────────────────────────
HEADER_BYTES = 16 << 20  # of a safetensors file or its index: a model of 92,000 tensors has 8 MB; takes 0.5 GB to read
MODEL_JSON_BYTES = 8 << 20  # config.json and generation_config.json: names of 20,000 classes are 1 MB
MODEL_NUMBER = 2**31  # in config.json: 10 million positions are the most known
MODEL_LAYERS = 300  # 126 are the most known; where the checkpoint has more of them, as many as it has …
MODEL_MOST_LAYERS = 1_000  # … but never more: a skeleton of so many takes 10 s
MODEL_PARTS = 100_000  # heads, labels, experts of all layers: 23,000 experts are the most known
GGUF_HEADER_BYTES = 128 << 20  # with its tokenizer; that of Gemma 3 has 8 MB
GGUF_ITEMS = 4_000_000  # of all lists in it: Gemma 3 has 1.3 million, each of which gguf's reader makes an array of
GGUF_NUMBERS = 1 << 36  # of a tensor
TOKENIZER_BYTES = 64 << 20  # a file of it; tokenizer.json of Gemma 3 has 33 MB
TOKEN_IDS = 10_000_000  # the highest number of a token: a table has a place for each. 262,000 is the most known
TOKEN_CHARACTERS = 4_096  # of one token: runs of 128 blanks are the longest known
TOKENIZER_GROWTH = 64  # how many times as long a normalizer may make a text: 1 is usual
TOKENS_OF_A_SENTENCE = 200  # with what is put before and behind it

# ── data files (data/files/readers.py, data/files/tables.py) ────────────────────────────────────────────────────
ROW_BYTES = 32 << 20  # one row, or one line: 8 million tokens; parsing JSON takes up to 20 times as much memory
UNPACKED_BYTES = 16 << 20  # that any packed file may hold …
UNPACKED_TIMES = 200  # … and this many times its own size: text is packed to a tenth, very regular text to a hundredth
UNPACKED_FIRST = 16 << 20  # packed files up to this size are unpacked once before a row is read: 8 s at most
UNPACKED_WHOLE = 256 << 20  # of what is unpacked at once: a packed .json or .txt, a batch of a table …
PARSED_BYTES = 512 << 20  # about what the values of a packed .json take in Python: `{}` are 3 bytes there, and 72 here
UNPACKED_WHOLE_TIMES = 20  # … and for a batch, this many times the file's size more: polars writes a table as one batch
TABLE_ROWS = 100_000  # that any table may have, and 100 for each of its bytes: rows can be repeated for nothing


class LimitReached(LoraError):
    """Foreign input asked for more than a limit allows. In a file it stops a run, also where other faults of a row are
    findings; of a chat template a few rows may be findings. Every further row might take as long."""


class Unpacked:
    """Counts what comes out of a packed file: a few bytes can hold any number of equal ones."""

    def __init__(self, file: Path):
        self._file = file
        self._left = self.most = UNPACKED_BYTES + UNPACKED_TIMES * file.stat().st_size

    def add(self, count: int) -> None:
        """Raises LimitReached beyond what a file of this size may hold."""
        self._left -= count
        if self._left < 0:
            what = f"this file holds more than {self.most:,} bytes, {UNPACKED_TIMES} times its own size"
            fix = "look at what wrote it; if the data is right, write it as .jsonl without compression"
            raise LimitReached(what, where=self._file, fix=fix)
