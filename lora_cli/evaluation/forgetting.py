"""Forgetting: what an adapter costs on text that has nothing to do with its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.text import positions, vocabulary
from lora_cli.data.chat.template import wants_bos
from lora_cli.data.example import Example
from lora_cli.errors import LoraError, reading
from lora_cli.evaluation.gain import paired_gain
from lora_cli.evaluation.perplexity import Collate, example_losses
from lora_cli.files import require_regular

WINDOW = 512  # tokens, or what the model sees if that is less
MOST_TOKENS = 4096  # of a text
LEAST_TOKENS = 64
_OWN = "built-in English prose"


@dataclass(frozen=True)
class GeneralText:
    """A text in windows, of whose tokens all but the first are targets. source: its file, or what it is."""

    source: str
    windows: list[Example]


def general_text(tokenizer: PreTrainedTokenizerBase, config: Any, path: Path | None = None) -> GeneralText | None:
    """The first 4,096 tokens of the user's UTF-8 text, or of 3,300 words that come with the program.

    Each window begins with BOS where the tokenizer puts one. None if the tokenizer cannot spell the built-in text, as
    one for another alphabet, or the model has no embedding for it: a loss on unknown tokens would say nothing.
    Raises LoraError for a file that cannot be read, is too short or cannot be spelled; call it before training.
    """
    text = _read(path or Path(__file__).with_name("general.txt"))
    backend: Any = tokenizer.backend_tokenizer
    ids = backend.encode(text, add_special_tokens=False).ids[:MOST_TOKENS]
    unknown = sum(id == tokenizer.unk_token_id for id in ids)
    if 2 * unknown > len(ids) or max(ids, default=0) >= vocabulary(config):
        if path is None:
            return None
        what = f"the model's tokenizer cannot spell this text: {unknown} of {len(ids)} tokens are unknown to it"
        raise LoraError(what, where=str(path), fix="name a text in a language that the model was trained on")
    if path is not None and len(ids) < LEAST_TOKENS:
        fix = f"name a text of a page or more: {LEAST_TOKENS} tokens at least, up to {MOST_TOKENS} are used"
        raise LoraError(f"{len(ids)} tokens are too few to measure anything on", where=str(path), fix=fix)
    length = min(WINDOW, positions(config) or WINDOW)
    start: list[int] = [tokenizer.bos_token_id] if wants_bos(tokenizer) else []  # type: ignore[list-item]
    step = length - len(start)
    rows = [start + ids[at : at + step] for at in range(0, len(ids), step)]
    source = _OWN if path is None else str(path)
    windows = [Example(row, [(1, len(row), 1.0)], source, at) for at, row in enumerate(rows) if len(row) > 1]
    return GeneralText(source, windows)


def measure_forgetting(
    model: Any,
    text: GeneralText,
    collate: Collate,
    *,
    share: tuple[int, int] = (0, 1),
    summed: Callable[[Tensor], Tensor] = lambda own: own,
) -> dict[str, Any]:
    """The text's loss without and with the adapter, as report.json holds it under `general_text`.

    before, after: nats per token. change = after - before, above zero where something was forgotten; low, high: ends of
    its 95 % interval, by window, or None for a single one. tokens: targets. source.

    One window a forward. share: see `example_losses`. summed: of a tensor, its sum over all processes.
    """
    longest = max(len(window.ids) for window in text.windows)

    def losses() -> tuple[Tensor, Tensor]:
        own = example_losses(model, text.windows, collate, longest, share=share)
        return summed(own[0]), summed(own[1])

    with adapters_disabled(model):
        before, targets = losses()
    after, _ = losses()
    gain = paired_gain(before, after, targets)
    return {
        "before": gain.before,
        "after": gain.after,
        "change": -gain.gain,
        "low": None if gain.high is None else -gain.high,
        "high": None if gain.low is None else -gain.low,
        "tokens": gain.targets,
        "source": text.source,
    }


def _read(path: Path) -> str:
    require_regular(path)
    what, fix = "the general text cannot be read", "name a text file, saved as UTF-8"
    with reading(what, path, fix), path.open(encoding="utf-8-sig") as stream:
        return stream.read(64 * MOST_TOKENS)  # characters: no need to tokenize a whole book
