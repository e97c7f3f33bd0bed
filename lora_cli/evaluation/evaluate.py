"""`lora eval`: base and adapter, side by side, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_cli.adapters.opened import Opened, open_model
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.text import positions
from lora_cli.data.batches import collate
from lora_cli.data.columns import NEEDED, applicable, column_of
from lora_cli.data.encode import target_bytes
from lora_cli.data.example import Example
from lora_cli.data.files.readers import Row
from lora_cli.data.files.sources import open_source
from lora_cli.data.formats import NoFormat
from lora_cli.data.gate import Findings
from lora_cli.data.prepare import prepare
from lora_cli.data.row_encoder import RowEncoder, fit_length
from lora_cli.errors import LoraError, refuse_if
from lora_cli.evaluation.perplexity import Score, score
from lora_cli.recipe import DataRecipe, SourceRecipe, load_recipe
from lora_cli.recipe.schema import OWN
from lora_cli.screen import styled
from lora_cli.streams import print_note

_DEFAULT_LENGTH = 1024  # tokens of context, where nothing says more


def evaluate_run(
    run: Path,
    data: Path | None,
    *,
    stride: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Score]:
    """Scores of a run's base model and adapter, on its validation data or on `data`.

    trust_remote_code: from the command line; the run's own recipe may be a stranger's.
    """
    file = run / "recipe.yaml"
    recipe = load_recipe(file)
    if recipe.trust_remote_code and not trust_remote_code:
        what = f"this run asks to execute the Python code of {recipe.base_model}, and a run may be a stranger's"
        raise LoraError(what, where=str(file), fix="read that code, then add --trust-remote-code")
    if data is None and recipe.data.validation is None:
        raise LoraError("this run has no validation data", where=str(run), fix="name a file with --data")
    own = recipe.model_dump(include={"quantization", "dtype", "revision"})
    at = device or recipe.device
    opened = open_model(recipe.base_model, run, device=at, trust_remote_code=trust_remote_code, **own)
    if data is not None:
        return compare(opened, *file_examples(data, opened, recipe.data.max_seq_len, stride, recipe.data))
    examples = prepare(recipe, opened.tokenizer).validation
    return compare(opened, examples, target_bytes(examples, opened.tokenizer))


def evaluate_model(
    model: str | None,
    adapter: Path | None,
    data: Path,
    *,
    max_seq_len: int | None = None,
    stride: int | None = None,
    **opening: Any,
) -> dict[str, Score]:
    """Scores of any base model, and of an adapter on it, on a data file. opening: further arguments of `open_model`."""
    opened = open_model(model, adapter, **opening)
    return compare(opened, *file_examples(data, opened, longest_window(opened, max_seq_len), stride))


def longest_window(opened: Opened, max_seq_len: int | None) -> int:
    """Tokens of context: those asked for, or 1024. Raises LoraError for more than the model can see."""
    longest = positions(opened.model.config) or _DEFAULT_LENGTH
    what = f"--max-seq-len {max_seq_len} is above what the model can see ({longest})"
    refuse_if(max_seq_len is not None and max_seq_len > longest, what, fix=f"use {longest} or less")
    return max_seq_len or min(longest, _DEFAULT_LENGTH)


def compare(opened: Opened, examples: Sequence[Example], text_bytes: int) -> dict[str, Score]:
    """`base`, and `adapter` if there is one, on the same examples."""
    for note in opened.notes:
        print_note(f"note: {note}")
    measure = measuring(opened, examples, text_bytes)
    with adapters_disabled(opened.model):
        scores = {"base": measure("base model")}
    if opened.adapter is not None:
        scores["adapter"] = measure("base model with the adapter")
    return scores


def measuring(opened: Opened, examples: Sequence[Example], text_bytes: int) -> Callable[[str], Score]:
    """The score of the model as it computes at the time, by the name that messages give it."""
    pad_id: Any = opened.tokenizer.eos_token_id
    lay_out = partial(collate, packed=False, pad_id=pad_id, device=opened.device)
    budget = max(4096, *(len(example.ids) for example in examples))
    return partial(score, opened.model, examples, lay_out, budget, text_bytes)


def as_dict(scores: dict[str, Score]) -> dict[str, Any]:
    """For --json. With an adapter also its gain over the base in nats a token, and the 95 % interval of that."""
    document: dict[str, Any] = {name: each.as_dict() for name, each in scores.items()}
    if "adapter" in scores:
        document |= scores["adapter"].gain_over(scores["base"]).interval()
    return document


def print_scores(scores: dict[str, Score], console: Console) -> None:
    console.print(score_table(scores.items() if "adapter" in scores else [("model", scores["base"])]))
    if "adapter" in scores:
        base, adapter = scores["base"], scores["adapter"]
        change, gain = 1 - adapter.perplexity / base.perplexity, adapter.gain_over(base)
        console.print(f"perplexity {abs(change):.1%} {'lower' if change >= 0 else 'higher'} with the adapter")
        if gain.low is not None and gain.high is not None:
            console.print(f"{gain.gain:.4f} nats a token better; 95 % interval {gain.low:.4f} to {gain.high:.4f}")


def score_table(scores: Iterable[tuple[str, Score]]) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for column in ("loss", "perplexity", "bits per byte", "target tokens"):
        table.add_column(column, justify="right")
    for name, each in scores:
        numbers = (f"{each.loss:.4f}", f"{each.perplexity:.3f}", f"{each.bits_per_byte:.4f}", f"{each.target_tokens:,}")
        table.add_row(styled(name), *numbers)
    return table


def file_examples(
    data: Path, opened: Opened, max_seq_len: int, stride: int | None, own: DataRecipe | None = None
) -> tuple[list[Example], int]:
    """Examples of a file, read as the run's own data are where there is a run.

    Text longer than max_seq_len is read through windows that move by `stride` tokens.
    """
    if stride is not None and not 0 < stride < max_seq_len:
        raise LoraError(f"--stride {stride} must be between 1 and {max_seq_len - 1}", fix="half of the window is usual")
    rows = list(open_source(SourceRecipe.model_validate({"path": str(data)}), held_out=True).rows())
    settings = _reading(own, data, rows)
    try:
        reader = RowEncoder(settings, opened.tokenizer, rows)
    except NoFormat as error:  # its fix is for a recipe
        fix = "remove or rename columns until they fit one format"
        if error.renamed:
            fix = f"rename the columns: {', '.join(f'{column} to {name}' for column, name in error.renamed)}"
        raise LoraError(error.what, where=error.where, details=error.details, fix=fix) from None
    findings = Findings()
    examples = [each.example for each in reader.encode(iter(rows), findings) if each.example is not None]
    findings.require_none(settings.allow)
    text_bytes = target_bytes(examples, opened.tokenizer)
    fitting: list[Example] = []
    for example in examples:
        if reader.format.name != "text" and len(example.ids) > max_seq_len:
            what = f"{len(example.ids)} tokens, but the window is {max_seq_len}"
            raise LoraError(what, where=example.source, fix="raise --max-seq-len, or remove the row")
        fitting += fit_length(example, max_seq_len, "split", "text", findings, stride or max_seq_len // 2)
    return fitting, text_bytes


def _reading(own: DataRecipe | None, data: Path, rows: list[Row]) -> DataRecipe:
    """How a file is read for a run: as the source of its data that has the same columns, else as its columns say."""
    values: dict[str, Any] = {"train": str(data)}
    if own is None:
        return DataRecipe.model_validate(values)
    there = {name for row in rows for name in row.values}

    def fits(each: DataRecipe) -> bool:
        columns, needed = applicable(each.columns, rows), NEEDED.get(each.format, ())
        named = not needed or any(there >= {column_of(columns, name) for name in some} for some in needed)
        return named and columns.keys() == each.columns.keys()

    kept = own.model_dump(include={"template", "allow", "train_on", "system"})
    fitting = filter(fits, [own.of(source) for source in (*own.held_out, *own.train)])
    if nearest := max(fitting, key=lambda each: len(each.columns), default=None):
        kept |= nearest.model_dump(include={*OWN})
    return DataRecipe.model_validate(values | kept)
