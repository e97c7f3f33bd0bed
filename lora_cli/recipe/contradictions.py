"""Settings of a recipe that are fine alone and wrong together."""

from __future__ import annotations

import re
from collections.abc import Callable

from lora_cli.quantization import RULES, named
from lora_cli.recipe.schema import FIELDS, OTHER_FIELDS, TEMPLATES, DataRecipe, Recipe, TrainRecipe


def contradictions(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Settings that are fine alone and wrong together: (key, what, fix) each."""
    found: list[tuple[str, str, str]] = []

    def refuse(when: bool, key: str, what: str, fix: str) -> None:
        if when:
            found.append((key, what, fix))

    adapter, data, train = recipe.adapter, recipe.data, recipe.train
    doubles = named(lambda rules: rules.double)
    refuse(
        "projections" in adapter.model_fields_set and adapter.target_modules != "attention",
        "adapter.projections",
        "projections belong to target_modules: attention, but target_modules names other layers",
        "remove projections, or write target_modules: attention",
    )
    refuse(
        "double_quantization" in recipe.model_fields_set
        and recipe.double_quantization
        and not RULES[recipe.quantization].double,
        "double_quantization",
        f"double_quantization is for {doubles}, but quantization is {recipe.quantization}",
        f"remove double_quantization, or write quantization: {doubles}",
    )
    refuse(
        recipe.dtype == "fp16" and recipe.device == "cpu",
        "dtype",
        "fp16 is for GPUs, but device is cpu",
        "write dtype: auto, or another device",
    )
    refuse(
        train.eval_every is not None and data.validation is None,
        "train.eval_every",
        "eval_every is set, but there is no validation data to evaluate on",
        "set data.validation to a file or a fraction such as 0.05, or remove eval_every",
    )
    _refuse_sources(data, refuse)
    refuse(
        "micro_batch_size" in train.model_fields_set and train.tokens_per_micro_batch is not None,
        "train.micro_batch_size",
        "micro_batch_size and tokens_per_micro_batch both say how large a micro-batch is",
        "remove one of them",
    )
    auto = train.micro_batch_size == "auto"
    refuse(
        auto and train.batch_size is None,
        "train.micro_batch_size",
        "auto decides how a step is split, but not how large it is",
        "set train.batch_size to the rows of a step, such as 16",
    )
    refuse(
        train.batch_size is not None and not auto,
        "train.batch_size",
        "the rows of a step already follow from micro_batch_size and gradient_accumulation_steps",
        "remove batch_size, or write micro_batch_size: auto",
    )
    refuse(
        auto and "gradient_accumulation_steps" in train.model_fields_set,
        "train.gradient_accumulation_steps",
        "with micro_batch_size: auto the number of micro-batches follows from what fits",
        "remove gradient_accumulation_steps; batch_size says how large a step is",
    )
    refuse(
        train.activation_memory is not None and train.gradient_checkpointing != "selective",
        "train.activation_memory",
        f"activation_memory is for selective checkpointing, but gradient_checkpointing is "
        f"{train.gradient_checkpointing}",
        "write gradient_checkpointing: selective, or remove activation_memory",
    )
    refuse(
        train.tokens_per_micro_batch is not None and train.tokens_per_micro_batch < data.max_seq_len,
        "train.tokens_per_micro_batch",
        f"a micro-batch of {train.tokens_per_micro_batch} tokens cannot hold a row of {data.max_seq_len}",
        f"write {data.max_seq_len} or more, or lower data.max_seq_len",
    )
    refuse(
        data.streaming and train.max_steps is None,
        "data.streaming",
        "a stream has no known length, so the run would have no end",
        "set train.max_steps",
    )
    refuse(
        data.streaming and "epochs" in train.model_fields_set and train.max_steps is not None,
        "train.epochs",
        "a stream has no known length, so it is not counted in epochs",
        "remove epochs; max_steps says when the run ends",
    )
    refuse(
        data.streaming and data.cache is not None,
        "data.cache",
        "a stream keeps no prepared tokens",
        "remove cache, or write streaming: false",
    )
    refuse(
        data.template is not None and "/" not in data.template and data.template not in TEMPLATES,
        "data.template",
        f"{data.template} is neither a built-in template nor a .jinja file",
        f"choose one of {', '.join(TEMPLATES)}, or write the path of a file",
    )
    for name in data.template_arguments:
        refuse(
            re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is None,
            "data.template_arguments",
            f"{name!r} is not a name that a template can read",
            "write a name of letters, digits and _, such as enable_thinking",
        )
    for name in data.columns:
        refuse(
            name in OTHER_FIELDS,
            "data.columns",
            f"{name} means the same as another field that is set",
            f"remove {name}, or the other one",
        )
        refuse(
            name not in (*FIELDS, *OTHER_FIELDS),
            "data.columns",
            f"unknown field {name}",
            f"the left side is one of {', '.join((*FIELDS, *OTHER_FIELDS))}; the right side is a column of yours",
        )
    refuse(
        "min_learning_rate_ratio" in train.model_fields_set
        and train.min_learning_rate_ratio > 0
        and train.schedule == "constant",
        "train.min_learning_rate_ratio",
        "a constant schedule has no lower end",
        "remove min_learning_rate_ratio, or choose schedule: cosine or linear",
    )
    if train.shard_base:
        _refuse_with_shards(recipe, refuse)
    if train.optimizer == "schedule_free_adamw":
        _refuse_with_schedule_free(train, refuse)
    return found


def _refuse_with_shards(recipe: Recipe, refuse: Callable[[bool, str, str, str], None]) -> None:
    why = RULES[recipe.quantization].not_sharded
    refuse(
        why is not None,
        "train.shard_base",
        str(why),
        f"write quantization: {named(lambda rules: rules.not_sharded is None)}, or remove shard_base",
    )
    refuse(
        recipe.train.micro_batch_size == "auto",
        "train.shard_base",
        "auto learns by running out of memory what fits, and a process that does so leaves the others waiting",
        "write a number for micro_batch_size",
    )
    refuse(
        recipe.train.compile,
        "train.compile",
        "the blocks of a base that is spread over processes come and go, and are not compiled here",
        "remove compile, or shard_base",
    )


def _refuse_with_schedule_free(train: TrainRecipe, refuse: Callable[[bool, str, str, str], None]) -> None:
    refuse(
        "schedule" in train.model_fields_set and train.schedule != "constant",
        "train.schedule",
        f"schedule_free_adamw takes the place of a schedule, but schedule is {train.schedule}",
        "remove schedule, or write schedule: constant",
    )
    refuse(
        train.min_learning_rate_ratio > 0 and train.schedule != "constant",
        "train.min_learning_rate_ratio",
        "schedule_free_adamw keeps the learning rate constant, so it has no lower end",
        "remove min_learning_rate_ratio, or choose optimizer: adamw",
    )
    refuse(
        train.beta1 == 0,
        "train.beta1",
        "schedule_free_adamw mixes its average by beta1 and divides by it",
        "write a beta1 above 0, such as 0.9",
    )


def _refuse_sources(data: DataRecipe, refuse: Callable[[bool, str, str, str], None]) -> None:
    held_out = data.validation if isinstance(data.validation, list) else []
    for key, sources in (("data.train", data.train), ("data.validation", held_out)):
        for source in sources:
            refuse(
                (source.path is None) == (source.hub is None),
                key,
                "a source has either a path or a hub data set",
                "write path: data/train.jsonl, or hub: owner/name",
            )
            refuse(
                source.hub is None and bool(source.model_fields_set & {"config", "split", "revision"}),
                key,
                "config, split and revision are for hub data sets",
                "remove them, or name the data set with hub: owner/name",
            )
    refuse(
        any(source in data.train for source in held_out),
        "data.validation",
        "validation and training data are the same",
        "name another file or split, or a fraction such as 0.05",
    )
    refuse(
        any(source.weight != 1 for source in held_out),
        "data.validation",
        "validation rows are scored once each, so a source there has no weight",
        "remove weight",
    )
    refuse(
        data.group_by is not None and not isinstance(data.validation, float),
        "data.group_by",
        "group_by is for holding out a fraction",
        "set data.validation to a fraction such as 0.05, or remove group_by",
    )
    refuse(
        data.streaming and isinstance(data.validation, float),
        "data.validation",
        "of a stream no fraction can be held out",
        "name a validation file or split",
    )
