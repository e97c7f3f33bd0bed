"""Settings that are fine alone and wrong together, as a table.

Part of it are settings that another one makes idle. Written in one file with it they are an error; where `--set` made
them idle they are dropped (load.py); as defaults they are left out when a recipe is written down (dump.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lora_cli.quantization import RULES, named
from lora_cli.recipe.keys import holder_of
from lora_cli.recipe.schema import FIELDS, OTHER_FIELDS, TEMPLATES, Recipe, SourceRecipe


class Rule(NamedTuple):
    """broken: whether a recipe breaks it, or the names that do, for an error each. what, fix: formatted with r, the
    recipe, and name. idle_by: the setting that makes `key` idle; None: the two contradict each other.
    """

    key: str
    broken: Callable[[Recipe], bool | list[str]]
    what: str
    fix: str
    idle_by: str | None = None

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))


def contradictions(recipe: Recipe, values: dict[str, Any]) -> Iterator[tuple[Rule, str, str]]:
    """(rule, what, fix) for each rule that a recipe breaks. values: as written; a default makes no setting idle."""
    for rule in TABLE:
        broken = rule.broken(recipe)
        if broken and (rule.idle_by is None or rule.path[-1] in holder_of(rule.path, values)):
            for name in broken if isinstance(broken, list) else [""]:
                yield rule, rule.what.format(r=recipe, name=name), rule.fix.format(r=recipe, name=name)


def idle_keys(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """The settings, at their defaults, that others make idle."""
    return (rule.path for rule in TABLE if rule.idle_by is not None and rule.broken(recipe))


def _held_out(r: Recipe) -> list[SourceRecipe]:
    return r.data.validation if isinstance(r.data.validation, list) else []


def _names_no_place(sources: list[SourceRecipe]) -> bool:
    return any((source.path is None) == (source.hub is None) for source in sources)


def _mixes_places(sources: list[SourceRecipe]) -> bool:
    return any(not source.hub and source.model_fields_set & {"config", "split", "revision"} for source in sources)


_DOUBLE = named(lambda rules: rules.double)


def _is_auto(r: Recipe) -> bool:
    return r.train.micro_batch_size == "auto"


def _is_schedule_free(r: Recipe) -> bool:
    return r.train.optimizer == "schedule_free_adamw"


TABLE = [
    Rule(
        "adapter.projections",
        lambda r: r.adapter.target_modules != "attention",
        "projections belong to target_modules: attention, but target_modules names other layers",
        "remove projections, or write target_modules: attention",
        idle_by="adapter.target_modules",
    ),
    Rule(
        "double_quantization",
        lambda r: r.double_quantization and not RULES[r.quantization].double,
        f"double_quantization is for {_DOUBLE}, but quantization is {{r.quantization}}",
        f"remove double_quantization, or write quantization: {_DOUBLE}",
        idle_by="quantization",
    ),
    Rule(
        "dtype",
        lambda r: r.dtype == "fp16" and r.device == "cpu",
        "fp16 is for GPUs, but device is cpu",
        "write dtype: auto, or another device",
    ),
    *(
        rule
        for key, sources in (("data.train", lambda r: r.data.train), ("data.validation", _held_out))
        for rule in (
            Rule(
                key,
                lambda r, sources=sources: _names_no_place(sources(r)),
                "a source has either a path or a hub data set",
                "write path: data/train.jsonl, or hub: owner/name",
            ),
            Rule(
                key,
                lambda r, sources=sources: _mixes_places(sources(r)),
                "config, split and revision are for hub data sets",
                "remove them, or name the data set with hub: owner/name",
            ),
        )
    ),
    Rule(
        "data.validation",
        lambda r: any(source in r.data.train for source in _held_out(r)),
        "validation and training data are the same",
        "name another file or split, or a fraction such as 0.05",
    ),
    Rule(
        "data.validation",
        lambda r: any(source.weight != 1 for source in _held_out(r)),
        "validation rows are scored once each, so a source there has no weight",
        "remove weight",
    ),
    Rule(
        "data.validation",
        lambda r: r.data.streaming and isinstance(r.data.validation, float),
        "no fraction of a stream can be held out",
        "name a validation file or split",
    ),
    Rule(
        "data.group_by",
        lambda r: r.data.group_by is not None and not isinstance(r.data.validation, float),
        "group_by is for holding out a fraction",
        "set data.validation to a fraction such as 0.05, or remove group_by",
        idle_by="data.validation",
    ),
    Rule(
        "data.streaming",
        lambda r: r.data.streaming and r.train.max_steps is None,
        "a stream has no known length, so the run would have no end",
        "set train.max_steps",
    ),
    Rule(
        "data.cache",
        lambda r: r.data.streaming and r.data.cache is not None,
        "a stream keeps no prepared tokens",
        "remove cache, or write streaming: false",
        idle_by="data.streaming",
    ),
    Rule(
        "data.template",
        lambda r: r.data.template is not None and "/" not in r.data.template and r.data.template not in TEMPLATES,
        "{r.data.template} is neither a built-in template nor a .jinja file",
        f"choose one of {', '.join(TEMPLATES)}, or write the path of a file",
    ),
    Rule(
        "data.template_arguments",
        lambda r: [name for name in r.data.template_arguments if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)],
        "{name!r} is not a name that a template can read",
        "write a name of letters, digits and _, such as enable_thinking",
    ),
    Rule(
        "data.columns",
        lambda r: [name for name in r.data.columns if name in OTHER_FIELDS],
        "{name} means the same as another field that is set",
        "remove {name}, or the other one",
    ),
    Rule(
        "data.columns",
        lambda r: [name for name in r.data.columns if name not in (*FIELDS, *OTHER_FIELDS)],
        "unknown field {name}",
        f"the left side is one of {', '.join((*FIELDS, *OTHER_FIELDS))}; the right side is a column of yours",
    ),
    Rule(
        "train.epochs",
        lambda r: r.data.streaming and r.train.max_steps is not None,
        "a stream has no known length, so it is not counted in epochs",
        "remove epochs; max_steps says when the run ends",
        idle_by="data.streaming",
    ),
    Rule(
        "train.eval_every",
        lambda r: r.train.eval_every is not None and r.data.validation is None,
        "eval_every is set, but there is no validation data to evaluate on",
        "set data.validation to a file or a fraction such as 0.05, or remove eval_every",
        idle_by="data.validation",
    ),
    Rule(
        "train.micro_batch_size",
        lambda r: r.train.tokens_per_micro_batch is not None,
        "micro_batch_size and tokens_per_micro_batch both say how large a micro-batch is",
        "remove one of them",
        idle_by="train.tokens_per_micro_batch",
    ),
    Rule(
        "train.micro_batch_size",
        lambda r: _is_auto(r) and r.train.batch_size is None,
        "auto decides how a step is split, but not how large it is",
        "set train.batch_size to the rows of a step, such as 16",
    ),
    Rule(
        "train.batch_size",
        lambda r: r.train.batch_size is not None and not _is_auto(r),
        "the rows of a step already follow from micro_batch_size and gradient_accumulation_steps",
        "remove batch_size, or write micro_batch_size: auto",
        idle_by="train.micro_batch_size",
    ),
    Rule(
        "train.gradient_accumulation_steps",
        _is_auto,
        "with micro_batch_size: auto the number of micro-batches follows from what fits",
        "remove gradient_accumulation_steps; batch_size says how large a step is",
        idle_by="train.micro_batch_size",
    ),
    Rule(
        "train.tokens_per_micro_batch",
        lambda r: (r.train.tokens_per_micro_batch or r.data.max_seq_len) < r.data.max_seq_len,
        "a micro-batch of {r.train.tokens_per_micro_batch} tokens cannot hold a row of {r.data.max_seq_len}",
        "write {r.data.max_seq_len} or more, or lower data.max_seq_len",
    ),
    Rule(
        "train.activation_memory",
        lambda r: r.train.activation_memory is not None and r.train.gradient_checkpointing != "selective",
        "activation_memory is for selective checkpointing, but gradient_checkpointing is "
        "{r.train.gradient_checkpointing}",
        "write gradient_checkpointing: selective, or remove activation_memory",
        idle_by="train.gradient_checkpointing",
    ),
    Rule(
        "train.min_learning_rate_ratio",
        lambda r: r.train.min_learning_rate_ratio > 0 and r.train.schedule == "constant",
        "a constant schedule has no lower end",
        "remove min_learning_rate_ratio, or choose schedule: cosine or linear",
        idle_by="train.schedule",
    ),
    Rule(
        "train.min_learning_rate_ratio",
        lambda r: _is_schedule_free(r) and r.train.min_learning_rate_ratio > 0 and r.train.schedule != "constant",
        "schedule_free_adamw keeps the learning rate constant, so it has no lower end",
        "remove min_learning_rate_ratio, or choose optimizer: adamw",
        idle_by="train.optimizer",
    ),
    Rule(
        "train.schedule",
        lambda r: _is_schedule_free(r) and r.train.schedule != "constant",
        "schedule_free_adamw takes the place of a schedule, but schedule is {r.train.schedule}",
        "remove schedule, or write schedule: constant",
        idle_by="train.optimizer",
    ),
    Rule(
        "train.beta1",
        lambda r: _is_schedule_free(r) and r.train.beta1 == 0,
        "schedule_free_adamw mixes its average by beta1 and divides by it",
        "write a beta1 above 0, such as 0.9",
    ),
    Rule(
        "train.shard_base",
        lambda r: [why] if r.train.shard_base and (why := RULES[r.quantization].not_sharded) else [],
        "{name}",
        f"write quantization: {named(lambda rules: rules.not_sharded is None)}, or remove shard_base",
    ),
    Rule(
        "train.shard_base",
        lambda r: r.train.shard_base and _is_auto(r),
        "auto learns by running out of memory what fits, and a process that does so leaves the others waiting",
        "write a number for micro_batch_size",
    ),
    Rule(
        "train.compile",
        lambda r: r.train.shard_base and r.train.compile,
        "blocks of a base that is spread over processes are gathered and released, and cannot be compiled here",
        "remove compile, or shard_base",
    ),
]
