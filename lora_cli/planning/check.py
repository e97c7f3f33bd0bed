"""`lora check`: everything short of training. No weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.file import commonest, peft_scaling
from lora_cli.adapters.layer import Target
from lora_cli.adapters.programs import Looked, of_base
from lora_cli.adapters.reach import kind_of, left_out_lines
from lora_cli.adapters.targets import not_adapted, targets_of
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import require_quantization
from lora_cli.data.example import Example
from lora_cli.data.feed import Feed, open_feed
from lora_cli.data.files.readers import numbered
from lora_cli.data.finding_kinds import KINDS
from lora_cli.data.prepare import prepare, require_trainable
from lora_cli.data.preview import PAGE_MARK, as_page, print_tokens, tokens_as_dicts
from lora_cli.data.report import counted
from lora_cli.errors import LoraError, from_here, refuse_if
from lora_cli.evaluation.quantization_cost import Costs, compare_quantizations, keep_costs, known_lines
from lora_cli.evaluation.samples import sample_prompts
from lora_cli.files import write_bytes
from lora_cli.planning.skeleton import base_model
from lora_cli.recipe import Recipe
from lora_cli.screen import say_on, styled


@dataclass(frozen=True)
class Checked:
    """What a recipe comes to. targets: the layers that the adapter matches; parameters: how many numbers are trained.

    left_out: parts of the model that are not text, for a person.
    """

    recipe: Recipe
    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    feed: Feed
    targets: list[Target]
    parameters: int
    left_out: list[str]

    def as_dict(self, show: int) -> dict[str, Any]:
        """For --json. Tokens are those of one epoch; a token counts as trained if it is a target of the loss."""
        data, train = self.feed.summary, self.feed.summary.train
        return {
            "ok": not data.findings.stopping(self.recipe.data.allow) and train.examples > 0,
            "steps": self.feed.total_steps,
            "examples": train.examples,
            "validation_examples": len(self.feed.validation),
            "tokens": train.tokens,
            "target_tokens": train.target_tokens,
            "lengths": train.percentiles,
            "formats": data.formats,
            "sources": [vars(each) for each in data.shares],
            "listing": data.listing,
            "template": data.template,
            "weights": data.weights and vars(data.weights),
            "layers": len(self.targets),
            "trained_parameters": self.parameters,
            "fingerprint": data.fingerprint,
            "findings": self.findings(),
            "rows": [
                {"source": example.file, "row": example.row, "tokens": tokens_as_dicts(example, self.tokenizer)}
                for example in self.shown(show)
            ],
        }

    def shown(self, show: int) -> Sequence[Example]:
        """The first examples that are trained on, in the order of the data."""
        return self.feed.first(show)

    def findings(self) -> list[dict[str, Any]]:
        return self.feed.summary.findings.as_list(self.recipe.data.allow)

    def looked(self) -> Looked:
        """The adapter that training would write, as other programs see it."""
        alpha = commonest({each.name: each.alpha for each in self.targets})
        ranks = {each.name: each.rank for each in self.targets}
        config = peft_scaling(ranks, alpha)
        config |= {key: value for each in self.targets for key, value in each.kind.peft_settings.items()}
        return Looked(config, ranks, (), *of_base(self.source))

    def require_ok(self) -> None:
        """Raises LoraError if the checks found something that stops a run, or no row is left."""
        require_trainable(self.feed.summary, self.recipe.data)


def base_of(recipe: Recipe) -> BaseSource:
    """The recipe's base model. Raises LoraError if it does not exist or cannot be held in the recipe's quantization."""
    code = recipe.trust_remote_code
    source = find_base(recipe.base_model, recipe.revision, trust_remote_code=code, tokenizer=recipe.tokenizer)
    require_quantization(source, recipe.quantization, recipe.group_size)
    return source


def check(recipe: Recipe, *, keep: bool = False) -> Checked:
    """Data through the gate, layers that the adapter matches. keep: leave the prepared tokens for `lora train`."""
    if keep and recipe.data.streaming:
        raise LoraError("--prepare keeps prepared tokens, but data.streaming keeps none", fix="remove one of them")
    source = base_of(recipe)
    base = base_model(source, trust_remote_code=recipe.trust_remote_code)
    tokenizer, config, model = base.tokenizer, base.config, base.skeleton
    # Which outputs of a fused layer are q or v is asked of a model that computes: here all projections are looked for.
    adapter = recipe.adapter.model_copy(update={"projections": ["q", "k", "v", "o"]})
    targets = targets_of(model, adapter, recipe.group_size)
    feed = open_feed(recipe, prepare(recipe, tokenizer, keep=keep, inspect=True), tokenizer)
    feed.require_fit(config, source.name)
    sample_prompts(recipe, tokenizer, feed, config)
    kinds = base.unreached_kinds(recipe.adapter.target_modules)
    base.require_causal()
    if recipe.data.packing and base.packing_refused is not None:
        raise base.packing_refused
    left_out = [target.name for target in targets if kind_of(target.name) in kinds]
    notes = left_out_lines(recipe.adapter.target_modules, left_out, some=len(left_out) < len(targets))
    targets = [target for target in targets if kind_of(target.name) not in kinds]
    parameters = sum(target.size(model.get_submodule(target.name)) for target in targets)
    return Checked(recipe, source, tokenizer, feed, targets, parameters, [*source.notes, *not_adapted(model), *notes])


def compare(checked: Checked, say: Callable[[str], None]) -> Costs:
    """Losses of the base in each quantization; kept beside the prepared data, where there are any."""
    costs = compare_quantizations(checked.recipe, checked.source, checked.feed, checked.tokenizer, say)
    if not checked.recipe.data.streaming:
        keep_costs(checked.recipe, costs)
    return costs


def write_page(checked: Checked, path: Path, show: int) -> None:
    """The preview as an HTML file. Raises LoraError if the path holds something else."""
    others = path.exists() and (path.is_dir() or PAGE_MARK not in path.read_bytes()[:200])
    refuse_if(others, "refusing to overwrite a file that lora did not write", where=path, fix="choose another --html")
    title, lines = f"lora check: {checked.recipe.base_model}", [f"{name}  {text}" for name, text in _lines(checked)]
    findings, allow = checked.feed.summary.findings, checked.recipe.data.allow
    write_bytes(path, as_page(title, lines, findings, allow, checked.shown(show), checked.tokenizer).encode())


def print_checked(checked: Checked, console: Console, show: int, *, known: bool = True) -> None:
    """known: also what is known of the cost of quantization; not where it is about to be measured."""
    say = say_on(console)
    for name, text in _lines(checked, known=known):
        say(f"{name:9}{text}")
    found = checked.findings()
    if found:
        table = Table("", "rows", "what", "where", "fix", box=None, pad_edge=False, header_style="bold")
        table.columns[1].justify = "right"
        for each in found:
            mark, style = ("stops", "bold red") if each["stops"] else ("note", "yellow")
            mark = "left out" if each["dropped"] else mark
            what, where, fix = KINDS[each["kind"]].title, styled(_where(each)), styled(each["fix"])
            dim = "" if each["stops"] else "dim"
            table.add_row(Text(mark, style=style), f"{each['count']:,}", what, where, fix, style=dim)
        console.print()
        console.print(table)
    for example in checked.shown(show):
        console.print()
        title = f"{example.source}: {len(example.ids):,} tokens, {example.targets:,} trained"
        console.print(styled(from_here(title), "bold"))
        print_tokens(console, example, checked.tokenizer)


def _where(finding: dict[str, Any]) -> str:
    """Rows by number; the file where there are several."""
    files = dict.fromkeys(finding["sources"])
    shown = list(map(numbered, finding["rows"][:5], finding["lines"]))
    if len(files) > 1:
        shown = [f"{Path(file).name}:{row}" for file, row in zip(finding["sources"], shown, strict=False)]
    return ", ".join(shown) + (" …" if finding["count"] > len(shown) and shown else "")


def _lines(checked: Checked, *, known: bool = True) -> list[tuple[str, str]]:
    notes = unusual(checked.recipe)
    adapter = f"{len(checked.targets)} layers, {checked.parameters:,} trained parameters"
    some = checked.recipe.adapter.projections
    if checked.recipe.adapter.target_modules == "attention" and len(set(some)) < 4:
        adapter = f"{', '.join(some)} of {len(checked.targets)} attention layers"
    elif not checked.recipe.data.streaming and checked.parameters:
        targets = checked.feed.summary.train.target_tokens
        adapter += f" for {counted(targets, 'target token')}"
        if targets > checked.parameters:
            notes.append("more target tokens than trained parameters: a higher adapter.rank may learn more of them")
    lines = [
        ("model", f"{checked.recipe.base_model} ({checked.source.config.get('model_type')})"),
        ("adapter", adapter),
        *(("", line) for line in checked.left_out),
        *(("note", line) for line in notes),
    ]
    if known:
        costs = known_lines(checked.recipe, checked.source, checked.feed.summary.fingerprint)
        lines += [("", line) for line in costs]
    return lines + [("" if at else "data", text) for at, text in enumerate(checked.feed.lines())]


def unusual(recipe: Recipe) -> list[str]:
    """Values that are almost certainly a typo, such as a learning rate of 1e4: a line each."""
    rate, epochs = recipe.train.learning_rate, recipe.train.epochs
    lines = [f"train.learning_rate is {rate:g}; LoRA is trained with 1e-5 to 1e-3"] if not 1e-7 <= rate <= 0.1 else []
    return lines + ([f"train.epochs is {epochs:g}; 1 to 10 are usual"] if epochs > 1000 else [])
