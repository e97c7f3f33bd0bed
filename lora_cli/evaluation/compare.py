"""`lora eval --adapter A --adapter B`: adapters of one base on the same tokens, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_cli.adapters.named import Named, read_named
from lora_cli.adapters.opened import adapter_template, open_base, other_base
from lora_cli.adapters.several import Several
from lora_cli.data.encode import target_bytes
from lora_cli.data.prepare import prepare
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate import file_examples, longest_window, measuring, score_table
from lora_cli.evaluation.perplexity import Score
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.streams import print_note


@dataclass(frozen=True)
class Compared:
    """scores: of each adapter, as it was named."""

    base: Score
    scores: dict[str, Score]

    def as_dict(self) -> dict[str, Any]:
        """For --json. Gains are in nats a token: of each adapter over the base, and in each pair of `to` over `of`."""
        scores = self.scores
        adapters = {name: each.as_dict() | each.gain_over(self.base).interval() for name, each in scores.items()}
        pairs = [
            {"of": one, "to": other} | scores[other].gain_over(scores[one]).interval()
            for one, other in combinations(scores, 2)
        ]
        return {"base": self.base.as_dict(), "adapters": adapters, "pairs": pairs}


def evaluate_several(
    sources: Sequence[str],
    base: str | None,
    data: Path | None,
    *,
    max_seq_len: int | None = None,
    stride: int | None = None,
    **opening: Any,
) -> Compared:
    """Scores of the base and of each adapter on the same tokens: of `data`, or the validation data of the first run.

    base: nothing means the one that all name. opening: further arguments of `open_base`.
    """
    if len(set(sources)) < len(sources):
        raise LoraError("an adapter is named twice", details=list(sources), fix="name each once")
    found = {source: read_named(source, base) for source in sources}
    recipe = _recipe([named for named, _ in found.values()])
    if data is None and (recipe is None or recipe.data.validation is None):
        raise LoraError("the first run has no validation data, or none is named", fix="name a file with --data")
    if data is None and recipe is not None:
        _require_same_split(recipe, [named.run for named, _ in found.values() if named.run is not None])
    if recipe is not None and opening.get("dtype") == "auto":
        opening["dtype"] = recipe.dtype  # as `lora eval RUN` computes
    opened = open_base(base, [stored for _, stored in found.values()], **opening)
    several = Several(opened.model, opened.source)
    several.add({source: stored for source, (_, stored) in found.items()})
    for note in [*opened.notes, *(note for _, stored in found.values() for note in other_base(stored, base))]:
        print_note(f"note: {note}")
    templates = [adapter_template(stored.folder) or opened.tokenizer.chat_template for _, stored in found.values()]
    opened.tokenizer.chat_template = templates[0]  # type: ignore[assignment]
    if any(each != templates[0] for each in templates):
        scored = f"conversations are scored in that of {sources[0]}"
        print_note(f"note: the adapters have different chat templates: {scored}")
    if data is None:
        assert recipe is not None
        examples = prepare(recipe, opened.tokenizer).validation
        text_bytes = target_bytes(examples, opened.tokenizer)
    else:
        window = longest_window(opened, max_seq_len or (recipe.data.max_seq_len if recipe is not None else None))
        examples, text_bytes = file_examples(data, opened, window, stride, recipe and recipe.data)
    measure, scores = measuring(opened, examples, text_bytes), {}
    base_score = measure("base model")
    for source in sources:
        several.use([{source: 1.0}])
        scores[source] = measure(f"base model with {source}")
    return Compared(base_score, scores)


def _recipe(named: Sequence[Named]) -> Recipe | None:
    """Of the first adapter that belongs to a run."""
    run = next((each.run for each in named if each.run is not None), None)
    return None if run is None else load_recipe(run / "recipe.yaml")


def _require_same_split(recipe: Recipe, runs: Sequence[Path]) -> None:
    """Raises LoraError for a run that may have seen what the first holds out: a fraction is drawn by the seed."""

    def split(own: Recipe) -> Any:
        return own.data.model_dump(exclude={"cache", "packing", "allow", "general_text"}), own.train.seed

    for run in () if recipe.data.held_out else runs:
        if split(load_recipe(run / "recipe.yaml")) != split(recipe):
            what = "this run holds other rows out than the first, so it may have been trained on those of the first"
            raise LoraError(what, where=run, fix="name rows that none was trained on: --data FILE")


def print_compared(compared: Compared, console: Console) -> None:
    """A table, and each adapter beside the best of them."""
    console.print(score_table([("base", compared.base), *compared.scores.items()]))
    best = min(compared.scores, key=lambda name: compared.scores[name].loss)
    others = [each for each in compared.scores.items() if each[0] != best]
    for name, score in [("the base", compared.base), *others]:
        word, gain = "better", compared.scores[best].gain_over(score)
        if gain.gain < 0:
            word, gain = "worse", score.gain_over(compared.scores[best])
        text = f"{best} is {gain.gain:.4f} nats a token {word} than {name}"
        if gain.low is not None and gain.high is not None:
            sure = "" if gain.low > 0 else f": not surely {word}"
            text += f"; 95 % interval {gain.low:+.4f} to {gain.high:+.4f}{sure}"
        console.print(text, markup=False)
