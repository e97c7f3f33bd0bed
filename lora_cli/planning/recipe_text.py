"""The text of a first recipe: few settings, and beside each why it is so, with the numbers it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import yaml

from lora_cli.errors import command
from lora_cli.evaluation.quantization_cost import Costs
from lora_cli.files import human_bytes
from lora_cli.planning import choices
from lora_cli.planning.choices import Adapter, Device, Fit
from lora_cli.planning.memory import GIB, ModelShape, estimate_memory, offloaded_bytes
from lora_cli.planning.reading import Reading
from lora_cli.planning.skeleton import BaseModel
from lora_cli.planning.survey import DataSurvey
from lora_cli.quantization import DEFAULT

_WIDTH = 100  # columns
_TRAINED = dict(completion="the completions", instruction="the answers", chat="the assistant's turns", text="all")


@dataclass(frozen=True)
class Names:
    """How the recipe writes model, data and run folder. recipe: the file itself."""

    base_model: str
    train: str | list[str]
    output: str
    recipe: str


@dataclass(frozen=True)
class Chosen:
    """What the recipe says and why, before it was tried.

    template: with the reason. system: as it was asked for. costs: measured ones.
    """

    base: BaseModel
    survey: DataSurvey
    device: Device
    template: tuple[str, str] | None
    system: str | None
    drop: tuple[str, ...]
    adapter: Adapter
    shape: ModelShape
    epochs: int
    validation: float | None
    fit: Fit
    costs: Costs | None = None


@dataclass(frozen=True)
class Tried:
    """What is known once the recipe was tried on the data. examples: after cutting; held_out: of them."""

    steps: int
    step_tokens: float
    examples: int
    held_out: int


class _Yaml:
    """Lines of YAML with comments: beside a setting where they are short, else above it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = ""

    def say(self, text: str) -> None:
        self.lines += [f"{self.indent}# {line}" for line in wrap(_printable(text), _WIDTH - len(self.indent) - 2)]

    def section(self, name: str) -> None:
        self.indent = ""
        self.lines.append(f"{name}:")
        self.indent = "  "

    def set(self, key: str, value: Any, why: str = "") -> None:
        line = f"{self.indent}{key}: {_written(value)}"
        beside = f"{line}  # {_printable(why)}"
        if why and len(beside) > _WIDTH:
            self.say(why)
        self.lines.append(beside if why and len(beside) <= _WIDTH else line)


def recipe_text(chosen: Chosen, names: Names, tried: Tried | None) -> str:
    """The file. tried: None for what can be tried; steps, and how often something happens, are only known after it."""
    text = _Yaml()
    _head(text, chosen, names)
    base, fit = chosen.base, chosen.fit
    parameters = f"{_count(chosen.shape.parameters)} parameters"
    text.set("base_model", names.base_model, f"{parameters} ({base.config.model_type})")
    if base.trust_remote_code:
        text.set("trust_remote_code", True, "as you allowed with --trust-remote-code")
    text.set("quantization", fit.quantization, _why_quantization(chosen, names))
    text.section("adapter")
    _adapter(text, chosen)
    text.section("data")
    _data(text, chosen, names, tried)
    text.section("train")
    _train(text, chosen, tried)
    text.indent = ""
    text.set("output", names.output)
    return "\n".join(text.lines) + "\n"


def _head(text: _Yaml, chosen: Chosen, names: Names) -> None:
    text.say(f"A first recipe, by `lora init`, for {chosen.device.name}. What you know better, change.")
    text.lines += ["#", f"#   {command('lora', 'check', names.recipe)}     what is trained on, token by token"]
    text.lines += [f"#   {command('lora', 'train', names.recipe)}", "#"]
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in vars(chosen.fit.memory).items())
    text.say(
        f"Memory, by an estimate that is not measured on a GPU: about {chosen.fit.memory.total / GIB:.1f} of "
        f"{chosen.device.memory / GIB:.1f} GiB ({parts})."
    )
    if chosen.device.on_cpu:
        text.say("No GPU was found here. For one elsewhere, name its memory, such as --gpu 12GB.")


def _why_quantization(chosen: Chosen, names: Names) -> str:
    width, chose = "fp32" if chosen.device.value_bytes == 4 else "bf16", chosen.fit.quantization

    def weights(quantization: str) -> str:
        nothing = {"tokens": 0, "target_tokens": 0, "gradient_checkpointing": "none"}
        value_bytes = chosen.device.value_bytes
        memory = estimate_memory(chosen.shape, quantization=quantization, value_bytes=value_bytes, **nothing)
        return human_bytes(memory.weights)

    if chosen.base.stored:
        return "as the checkpoint is stored"
    held = f"in {width} the weights take {weights('none')}"
    if chose == "none":
        held += f", which fits well ({weights(DEFAULT)} in {DEFAULT})"
    else:
        held = f"the weights take {weights(chose)}; in {width} they would take {weights('none')}"
    least = chosen.costs and chosen.costs.of(DEFAULT)
    if least:
        own = chosen.costs and chosen.costs.of(chose)
        also = f", {chose} {own.cost:+.2f}" if own and chose not in ("none", DEFAULT) else ""
        return f"{held}. Measured on this model: {DEFAULT} {least.cost:+.2f} nats a token{also}"
    if chose == "none":
        return f"{held}; {DEFAULT} cost a model of 135 million parameters 0.1 to 0.4 nats a token"
    measure = command("lora", "check", names.recipe, "--compare-quantization")
    return f"{held}. What that costs: {measure}"


def _adapter(text: _Yaml, chosen: Chosen) -> None:
    adapter, survey = chosen.adapter, chosen.survey
    trained = _amount(survey.target_tokens, survey.exact)
    text.set("rank", adapter.rank, f"{adapter.parameters:,} trained parameters, for {trained} trained tokens")
    text.set("alpha", 32, "at every rank, so that the best learning rate hardly depends on it")
    if adapter.target_modules == "all-linear":
        why = "QLoRA needed all of them to match full fine-tuning (Dettmers et al. 2023)"
        text.set("target_modules", "all-linear", f"{len(adapter.layers)} layers; {why}")


def _data(text: _Yaml, chosen: Chosen, names: Names, tried: Tried | None) -> None:
    survey, reading = chosen.survey, chosen.survey.reading
    tokens, trained = (_amount(number, survey.exact) for number in (survey.tokens, survey.target_tokens))
    text.say(
        f"{_amount(survey.rows, survey.counted)} rows of {reading.shown}: {tokens} tokens, {trained} of them trained "
        f"({', '.join(_TRAINED[name] for name in reading.names)})."
    )
    if reading.unused:
        text.say(f"Columns not used: {', '.join(reading.unused)}.")
    if survey.sample is not None:
        text.say(f"Lengths are those of {len(survey.lengths):,} rows; the others are seen by `lora check`.")
    if reading.each:
        text.lines.append(f"{text.indent}train:")
        for path, each in zip(names.train, reading.each, strict=True):
            text.indent = "    - "
            text.set("path", path)
            text.indent = "      "
            _how(text, each, survey)
        text.indent = "  "
    else:
        text.set("train", names.train)
        _how(text, reading, survey)
    if chosen.template is not None:
        text.set("template", *chosen.template)
    if chosen.system is not None:
        text.set("system", chosen.system, "put before every conversation that has none")
    if chosen.drop:
        text.set("drop", list(chosen.drop), "rows with these problems are left out, and counted")
    if chosen.validation is not None:
        held = f"{_amount(tried.held_out, survey.exact)} " if tried else ""
        text.set("validation", chosen.validation, f"{held}examples held out, by which the best adapter is kept")
    else:
        few = f"{survey.distinct:,} different rows are too few to hold some out (from {choices.FEWEST_TO_SPLIT} on)"
        text.say(f"No validation: {few}; better name a file.")
    _lengths(text, chosen, tried)
    if not chosen.base.packs:
        text.set("packing", False, "this architecture does not keep examples on one row apart")


def _how(text: _Yaml, reading: Reading, survey: DataSurvey) -> None:
    if reading.wanted != "auto":
        text.set("format", reading.wanted, reading.why)
    if reading.columns:
        text.set("columns", reading.columns, "what they mean here" if reading.wanted != "auto" else reading.why)
    if survey.train_on is not None and {"chat", "instruction"} & {*reading.names}:
        text.set("train_on", *survey.train_on)


def _lengths(text: _Yaml, chosen: Chosen, tried: Tried | None) -> None:
    survey, row = chosen.survey, chosen.fit.row
    longest, most = survey.percentiles["longest"], survey.percentiles["p95"]
    rows = "texts" if survey.reading.name == "text" else "rows"
    why = f"95 % of your {rows} have at most {most:,} tokens, the longest has {longest:,}"
    reasons: dict[str | None, str] = {
        "model": f"; the model sees {row.tokens:,} at most",
        "memory": "; more would not fit into the memory",
        "text": "; longer pieces would take more memory",
    }
    text.set("max_seq_len", row.tokens, why + reasons.get(row.limit, ""))
    if row.too_long is not None:
        longer = int((survey.lengths > row.tokens).sum())
        done = "left out" if row.too_long == "drop" else "cut into pieces"
        pieces = ""
        if tried and row.too_long == "split":
            pieces = f", which makes {_amount(tried.examples, survey.exact)} examples"
        text.set("too_long", row.too_long, f"{longer:,} of {len(survey.lengths):,} {rows} are longer: {done}{pieces}")


def _train(text: _Yaml, chosen: Chosen, tried: Tried | None) -> None:
    fit, survey = chosen.fit, chosen.survey
    steps = tried.steps if tried else 0
    passes = {1: "enough for one pass", 2: "not many: two passes", 3: "few: three passes"}[chosen.epochs]
    why = f"{_amount(survey.tokens, survey.exact)} tokens are {passes}"
    text.set("epochs", chosen.epochs, f"{why}, {_amount(steps, survey.exact)} steps" if tried else why)
    if steps > choices.MOST_STEPS:
        text.set("max_steps", choices.MOST_STEPS, "enough to see what is learned; remove it for all of them")
    why = "rows at a time: decides over memory and speed, not over the result"
    text.set("micro_batch_size", fit.micro_batch_size, why)
    tokens = f"about {tried.step_tokens:,.0f} tokens a step" if tried else ""
    text.set("gradient_accumulation_steps", fit.gradient_accumulation_steps, tokens)
    if fit.gradient_checkpointing != "none":
        without = fit.without_checkpointing.total / GIB
        mode, which = "selective", "of as few blocks as the memory asks for; "
        if chosen.device.on_cpu:
            mode, which = "full", ""
        if fit.gradient_checkpointing == "offload":
            tokens = fit.row.tokens * fit.micro_batch_size
            host = human_bytes(offloaded_bytes(chosen.shape, tokens, chosen.device.value_bytes))
            mode, which = "offload", f"of all blocks, whose inputs take {host} of host memory; "
        text.set("gradient_checkpointing", mode, f"{which}without it, a step would need about {without:.1f} GiB")
    examples = choices.STEP_TOKENS / min(fit.row.tokens, survey.tokens / survey.rows)
    kind = chosen.base.config.model_type
    text.set("learning_rate", *choices.choose_learning_rate(kind, chosen.shape.hidden, examples))
    steps = min(steps, choices.MOST_STEPS)
    if steps >= 2:
        every = max(1, round(steps / 10))
        if chosen.validation is not None:
            text.set("eval_every", every, "about ten times in the run")
            text.set("sample_every", 5 * every, "answers to 3 validation rows: before, halfway and at the end")
        text.set("checkpoint_every", every, "what `lora train --resume` continues from")


def _amount(number: float, exact: bool) -> str:
    return f"{number:,.0f}" if exact else f"about {float(f'{number:.2g}'):,.0f}"


def _count(number: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number:,}"


def _printable(text: str) -> str:
    """On one line, and without what YAML does not let into a comment."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _written(value: Any) -> str:
    """As YAML on one line; small numbers as 2e-4."""
    if isinstance(value, float) and value < 2e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    style = None if str(value).isprintable() and repr(value).isprintable() else '"'
    how = {"default_flow_style": True, "default_style": style, "allow_unicode": style is None}
    written = yaml.safe_dump(value, width=10**9, sort_keys=False, **how)
    return written.removesuffix("...\n").strip()
