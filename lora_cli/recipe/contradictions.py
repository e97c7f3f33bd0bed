"""Settings that are fine alone and wrong together, as a table.

Part of it are settings that another one makes idle. Written in one file with it they are an error; where `--set` made
them idle they are dropped (load.py); as defaults they are left out when a recipe is written down (dump.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lora_cli.quantization import RULES, named
from lora_cli.recipe.keys import holder_of
from lora_cli.recipe.schema import FIELDS, OTHER_FIELDS, OWN, TEMPLATES, Recipe


class Rule(NamedTuple):
    """broken: whether a recipe breaks it, or what does: a name, or a list of names for an error each. idle_by: the
    setting that makes `key` idle; None: the two contradict each other. what, fix: formatted with r, the recipe, and
    name.
    """

    key: str
    broken: Callable[[Recipe], object]
    idle_by: str | None = None
    what: str = ""
    fix: str = ""

    def says(self, what: str, *, fix: str, idle_by: str | None = None) -> Rule:
        return self._replace(what=what, fix=fix, idle_by=idle_by)

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))


def contradictions(recipe: Recipe, values: dict[str, Any]) -> Iterator[tuple[Rule, str, str]]:
    """(rule, what, fix) for each rule that a recipe breaks. values: as written; a default makes no setting idle."""
    for rule in TABLE:
        broken = rule.broken(recipe)
        if broken and (rule.idle_by is None or rule.path[-1] in holder_of(rule.path, values)):
            for name in broken if isinstance(broken, list) else [broken]:
                yield rule, rule.what.format(r=recipe, name=name), rule.fix.format(r=recipe, name=name)


def idle_keys(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """The settings, at their defaults, that others make idle."""
    return (rule.path for rule in TABLE if rule.idle_by is not None and rule.broken(recipe))


_SOURCES = {"data.train": lambda r: r.data.train, "data.validation": lambda r: r.data.held_out}
_WITH_COLUMNS = {"data.columns": lambda r: [r.data], **_SOURCES}
_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")  # as Jinja has them
_OF_THE_HUB = {"config", "split", "revision"}
_OF_ALL_ROWS = ("duplicate", "overlap")  # findings
_DOUBLE = named(lambda rules: rules.double)
_GROUPS = named(lambda rules: rules.groups)


def _fields(sources: Sequence[Any]) -> list[str]:
    return [name for each in sources for name in each.columns or {}]


def _is_auto(r: Recipe) -> bool:
    return r.train.micro_batch_size == "auto"


def _is_schedule_free(r: Recipe) -> bool:
    return r.train.optimizer == "schedule_free_adamw"


TABLE = [
    Rule("adapter.projections", lambda r: r.adapter.target_modules != "attention").says(
        "projections belong to target_modules: attention, but target_modules names other layers",
        fix="remove projections, or write target_modules: attention",
        idle_by="adapter.target_modules",
    ),
    Rule("double_quantization", lambda r: r.double_quantization and not RULES[r.quantization].double).says(
        f"double_quantization is for {_DOUBLE}, but quantization is {{r.quantization}}",
        fix=f"remove double_quantization, or write quantization: {_DOUBLE}",
        idle_by="quantization",
    ),
    Rule("group_size", lambda r: r.group_size != 32 and not RULES[r.quantization].groups).says(
        f"group_size is for {_GROUPS}, but quantization is {{r.quantization}}",
        fix=f"remove group_size, or write quantization: {_GROUPS}",
        idle_by="quantization",
    ),
    Rule("adapter.method", lambda r: r.adapter.method == "qa_lora" and not RULES[r.quantization].groups).says(
        f"qa_lora changes the offsets of groups, which only quantization: {_GROUPS} has",
        fix=f"write quantization: {_GROUPS}, or method: lora",
    ),
    Rule("dtype", lambda r: r.dtype == "fp16" and r.device == "cpu").says(
        "fp16 is for GPUs, but device is cpu", fix="write dtype: auto, or another device"
    ),
    *(
        Rule(key, lambda r, of=of: any((source.path is None) == (source.hub is None) for source in of(r))).says(
            "a source has either a path or a hub data set", fix="write path: data/train.jsonl, or hub: owner/name"
        )
        for key, of in _SOURCES.items()
    ),
    *(
        Rule(key, lambda r, of=of: any(not each.hub and each.model_fields_set & _OF_THE_HUB for each in of(r))).says(
            "config, split and revision are for hub data sets",
            fix="remove them, or name the data set with hub: owner/name",
        )
        for key, of in _SOURCES.items()
    ),
    Rule("data.validation", lambda r: any(source in r.data.train for source in r.data.held_out)).says(
        "validation and training data are the same", fix="name another file or split, or a fraction such as 0.05"
    ),
    Rule("data.validation", lambda r: any(source.weight != 1 for source in r.data.held_out)).says(
        "validation rows are scored once each, so a source there has no weight", fix="remove weight"
    ),
    Rule("data.validation", lambda r: r.data.streaming and isinstance(r.data.validation, float)).says(
        "no fraction of a stream can be held out", fix="name a validation file or split"
    ),
    Rule("data.group_by", lambda r: r.data.group_by and not isinstance(r.data.validation, float)).says(
        "group_by is for holding out a fraction",
        fix="set data.validation to a fraction such as 0.05, or remove group_by",
        idle_by="data.validation",
    ),
    Rule("data.streaming", lambda r: r.data.streaming and r.train.max_steps is None).says(
        "a stream has no known length, so the run would have no end", fix="set train.max_steps"
    ),
    Rule("data.drop", lambda r: [kind for kind in r.data.drop if kind in r.data.allow]).says(
        "{name} is in data.allow too, which keeps its rows", fix="remove it from one of them"
    ),
    Rule("data.drop", lambda r: [kind for kind in r.data.drop if r.data.streaming and kind in _OF_ALL_ROWS]).says(
        "{name} takes all rows to be found, and a stream keeps none",
        fix="remove it from data.drop, or write streaming: false",
    ),
    Rule("data.cache", lambda r: r.data.streaming and r.data.cache).says(
        "a stream keeps no prepared tokens", fix="remove cache, or write streaming: false", idle_by="data.streaming"
    ),
    Rule("data.template", lambda r: r.data.template not in (None, *TEMPLATES) and "/" not in r.data.template).says(
        "{r.data.template} is neither a built-in template nor a .jinja file",
        fix=f"choose one of {', '.join(TEMPLATES)}, or write the path of a file",
    ),
    Rule(
        "data.template_arguments", lambda r: [name for name in r.data.template_arguments if not _NAME.fullmatch(name)]
    ).says(
        "{name!r} is not a name that a template can read",
        fix="write a name of letters, digits and _, such as enable_thinking",
    ),
    *(
        Rule(key, lambda r, of=of: [name for name in _fields(of(r)) if name in OTHER_FIELDS]).says(
            "{name} means the same as another field that is set", fix="remove {name}, or the other one"
        )
        for key, of in _WITH_COLUMNS.items()
    ),
    *(
        Rule(key, lambda r, of=of: [name for name in _fields(of(r)) if name not in (*FIELDS, *OTHER_FIELDS)]).says(
            "unknown field {name}",
            fix=f"the left side is one of {', '.join((*FIELDS, *OTHER_FIELDS))}; the right side is a column of yours",
        )
        for key, of in _WITH_COLUMNS.items()
    ),
    *(
        Rule(f"data.{key}", lambda r, key=key: all(key in each.own for each in (*r.data.train, *r.data.held_out))).says(
            f"every source has {key} of its own", fix=f"remove {key} here, or that of a source", idle_by="data.train"
        )
        for key in OWN
    ),
    Rule("train.epochs", lambda r: r.data.streaming and r.train.max_steps).says(
        "a stream has no known length, so it is not counted in epochs",
        fix="remove epochs; max_steps says when the run ends",
        idle_by="data.streaming",
    ),
    Rule("train.eval_every", lambda r: r.train.eval_every and r.data.validation is None).says(
        "eval_every is set, but there is no validation data to evaluate on",
        fix="set data.validation to a file or a fraction such as 0.05, or remove eval_every",
        idle_by="data.validation",
    ),
    Rule("train.patience", lambda r: r.train.patience and r.train.eval_every is None).says(
        "patience counts the evaluations of eval_every, which is not set",
        fix="set train.eval_every to the steps between evaluations, or remove patience",
        idle_by="train.eval_every",
    ),
    Rule("train.samples", lambda r: r.train.sample_every is None and r.train.samples != 3).says(
        "samples are made every sample_every steps, which is not set",
        fix="set train.sample_every to the steps between samples, or remove samples",
        idle_by="train.sample_every",
    ),
    Rule(
        "train.sample_every",
        lambda r: r.train.sample_every and isinstance(r.train.samples, int) and r.data.validation is None,
    ).says(
        "samples are of validation rows, but there is no validation data",
        fix="name a file of prompts in train.samples, set data.validation to a fraction such as 0.05, or remove "
        "sample_every",
        idle_by="data.validation",
    ),
    Rule("train.sample_every", lambda r: r.train.sample_every and r.train.shard_base).says(
        "one process writes the samples, and a base that is spread over processes computes with all of them",
        fix="remove sample_every, or shard_base",
    ),
    Rule("train.micro_batch_size", lambda r: r.train.tokens_per_micro_batch).says(
        "micro_batch_size and tokens_per_micro_batch both say how large a micro-batch is",
        fix="remove one of them",
        idle_by="train.tokens_per_micro_batch",
    ),
    Rule("train.micro_batch_size", lambda r: _is_auto(r) and r.train.batch_size is None).says(
        "auto decides how a step is split, but not how large it is",
        fix="set train.batch_size to the rows of a step, such as 16",
    ),
    Rule("train.batch_size", lambda r: r.train.batch_size and not _is_auto(r)).says(
        "the rows of a step already follow from micro_batch_size and gradient_accumulation_steps",
        fix="remove batch_size, or write micro_batch_size: auto",
        idle_by="train.micro_batch_size",
    ),
    Rule("train.gradient_accumulation_steps", _is_auto).says(
        "with micro_batch_size: auto the number of micro-batches follows from what fits",
        fix="remove gradient_accumulation_steps; batch_size says how large a step is",
        idle_by="train.micro_batch_size",
    ),
    Rule(
        "train.tokens_per_micro_batch",
        lambda r: (r.train.tokens_per_micro_batch or r.data.max_seq_len) < r.data.max_seq_len,
    ).says(
        "a micro-batch of {r.train.tokens_per_micro_batch} tokens cannot hold a row of {r.data.max_seq_len}",
        fix="write {r.data.max_seq_len} or more, or lower data.max_seq_len",
    ),
    Rule(
        "train.activation_memory", lambda r: r.train.activation_memory and r.train.gradient_checkpointing != "selective"
    ).says(
        "activation_memory is for gradient_checkpointing: selective, but it is {r.train.gradient_checkpointing}",
        fix="write gradient_checkpointing: selective, or remove activation_memory",
        idle_by="train.gradient_checkpointing",
    ),
    Rule(
        "train.min_learning_rate_ratio", lambda r: r.train.min_learning_rate_ratio and r.train.schedule == "constant"
    ).says(
        "a constant schedule has no lower end",
        fix="remove min_learning_rate_ratio, or choose schedule: cosine or linear",
        idle_by="train.schedule",
    ),
    Rule(
        "train.min_learning_rate_ratio",
        lambda r: _is_schedule_free(r) and r.train.min_learning_rate_ratio and r.train.schedule != "constant",
    ).says(
        "schedule_free_adamw keeps the learning rate constant, so it has no lower end",
        fix="remove min_learning_rate_ratio, or choose optimizer: adamw",
        idle_by="train.optimizer",
    ),
    Rule("train.schedule", lambda r: _is_schedule_free(r) and r.train.schedule != "constant").says(
        "schedule_free_adamw takes the place of a schedule, but schedule is {r.train.schedule}",
        fix="remove schedule, or write schedule: constant",
        idle_by="train.optimizer",
    ),
    Rule("train.beta1", lambda r: _is_schedule_free(r) and r.train.beta1 == 0).says(
        "schedule_free_adamw mixes its average by beta1 and divides by it", fix="write a beta1 above 0, such as 0.9"
    ),
    Rule("train.shard_base", lambda r: r.train.shard_base and RULES[r.quantization].not_sharded).says(
        "{name}", fix=f"write quantization: {named(lambda rules: rules.not_sharded is None)}, or remove shard_base"
    ),
    Rule("train.shard_base", lambda r: r.train.shard_base and _is_auto(r)).says(
        "auto learns by running out of memory what fits, and a process that does so leaves the others waiting",
        fix="write a number for micro_batch_size",
    ),
    Rule("train.compile", lambda r: r.train.shard_base and r.train.compile).says(
        "blocks of a base that is spread over processes are gathered and released, and cannot be compiled here",
        fix="remove compile, or shard_base",
    ),
    Rule("train.liger_kernel", lambda r: r.train.liger_kernel and r.train.compile).says(
        "compile fuses the same work", fix="remove compile, or liger_kernel"
    ),
    Rule("train.liger_kernel", lambda r: r.train.liger_kernel and r.train.shard_base).says(
        "kernels are tried on the whole model on a GPU, where a base that is to be spread does not fit",
        fix="remove liger_kernel, or shard_base",
    ),
]
