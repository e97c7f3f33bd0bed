"""Which layers to adapt: from what the recipe says, by the structure of the model, without a list per architecture."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.kinds import KINDS
from lora_cli.adapters.layer import Target
from lora_cli.adapters.patterns import BadPattern, matching
from lora_cli.adapters.projections import output_parts
from lora_cli.base.linear import features, is_linear
from lora_cli.base.text import in_language_model, left_out
from lora_cli.errors import LoraError
from lora_cli.recipe import AdapterRecipe


def targets_of(model: Any, adapter: AdapterRecipe, group_size: int) -> list[Target]:
    """The layers to adapt by a recipe's adapter section; raises as find_targets does.

    group_size: of the base; raises LoraError where an adapter that needs whole groups would be on a layer without.
    """
    targets = find_targets(model, **adapter.model_dump(exclude={"dropout", "init", "method"}))
    kind: Any = KINDS[adapter.method]
    if not kind.grouped:
        return targets
    odd = [each.name for each in targets if features(model.get_submodule(each.name))[0] % group_size]
    if odd:
        raise LoraError(
            f"adapter.method: {adapter.method} needs layers whose inputs are whole groups of {group_size}, but "
            f"{len(odd)} layers have other widths",
            details=[f"{name}: {features(model.get_submodule(name))[0]} inputs" for name in odd[:5]],
            fix="write a group_size that divides them, or leave them out with adapter.exclude_modules: "
            f"[{', '.join(sorted({name.rsplit('.', 1)[-1] for name in odd}))}]",
        )
    return [replace(each, kind=kind, group_size=group_size) for each in targets]


def find_targets(
    model: Any,
    target_modules: str | Sequence[str] = "attention",
    *,
    rank: int,
    alpha: float,
    projections: Sequence[str] = ("q", "k", "v", "o"),
    exclude_modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    rank_stabilized: bool = False,
) -> list[Target]:
    """The layers that a recipe's `adapter` section names, in the model's order.

    rank_stabilized: the scaling is alpha / √rank instead of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732).

    Raises LoraError, listing the linear layers that exist, when a name, pattern or layer index matches nothing or a
    rank is larger than its layer.
    """
    linear = linear_layers(model)
    names = _select(model, linear, target_modules)
    for pattern in exclude_modules:
        hit = _require(pattern, names, "exclude_modules", linear)
        names = [name for name in names if name not in hit]
    if layers is not None:
        names = _in_layers(names, layers, block_lists(model))
    if not names:
        fix = "loosen adapter.exclude_modules or adapter.layers"
        raise LoraError("no layer is left to adapt", details=[_listing(linear)], fix=fix)
    targets = {name: Target(name, rank, alpha) for name in names}
    for what, values in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        for pattern, value in (values or {}).items():
            hit = _require(pattern, names, f"{what}_pattern", linear)
            targets |= {name: replace(targets[name], **{what: value}) for name in hit}
    if rank_stabilized:  # written as the alpha that gives the same scaling, which every reader of adapters knows
        targets = {n: replace(each, alpha=each.alpha * math.sqrt(each.rank)) for n, each in targets.items()}
    asked = targets
    if set(projections) != {"q", "k", "v", "o"}:
        targets = _only_projections(model, targets, projections)
    for target in (asked[name] for name in targets):  # what is joined in a fused layer may add up to more
        smallest = min(features(linear[target.name]))
        if target.rank > smallest:
            raise LoraError(
                f"rank {target.rank} is above the size of {target.name}, whose weight has rank {smallest} at most",
                fix=f"set adapter.rank to {smallest} or less, give this layer its own in adapter.rank_pattern, or "
                "leave it out with adapter.exclude_modules",
            )
    return list(targets.values())


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every layer an adapter can wrap, by name, but for the output head (which shares weights with the embeddings).

    Of a model that also takes pictures or sound, those of the language model.
    """
    inside = in_language_model(model)
    return {name: module for name, module in all_linear_layers(model).items() if inside(name)}


def all_linear_layers(model: Any) -> dict[str, nn.Module]:
    """The same with the layers of pictures and sound, which text never reaches."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}


def not_adapted(model: Any) -> list[str]:
    """For a person: the parts of the model that adapters leave out because text never reaches them."""
    parts = left_out(model, all_linear_layers(model))
    return [f"{count} linear layers of {part} are left out: they see no text" for part, count in parts.items()]


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of transformer blocks, such as `model.layers`: lists of modules that hold linear layers."""
    found: list[str] = []
    inside = in_language_model(model)
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and inside(name) and not inside_another:
            holds_linear = any(is_linear(inner) for inner in module[0].modules() if inner is not module[0])
            if holds_linear:
                found.append(name)
    return found


def _select(model: Any, linear: dict[str, nn.Module], target_modules: str | Sequence[str]) -> list[str]:
    if target_modules == "all-linear":
        names = [name for name in linear if any(name.startswith(f"{blocks}.") for blocks in block_lists(model))]
    elif target_modules == "attention":
        names = _attention_layers(model, linear)
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else target_modules
        hit = {name for pattern in patterns for name in _require(pattern, list(linear), "target_modules", linear)}
        names = [name for name in linear if name in hit]
    if not names:
        raise LoraError(
            f"adapter.target_modules: {target_modules} matched no layer",
            details=[_listing(linear)],
            fix="name some of them in adapter.target_modules, or write target_modules: all-linear",
        )
    return names


def _attention_layers(model: nn.Module, linear: dict[str, nn.Module]) -> list[str]:
    """Linear layers inside a module that is an attention by its class, in a transformer block.

    In transformers every softmax attention is a class named …Attention…; the modules around it (norms, MLP) are not.
    Attributes differ by architecture (`attn`, `self_attention`, `self_attn`), class names do not.
    """
    attentions = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    blocks = block_lists(model)
    return [
        name
        for name in linear
        if any(name.startswith(f"{attention}.") for attention in attentions)
        and any(name.startswith(f"{outer}.") for outer in blocks)
    ]


def _require(pattern: str, names: list[str], key: str, linear: dict[str, nn.Module]) -> list[str]:
    try:
        hit = matching(pattern, names)
    except BadPattern as error:
        what, fix = f"adapter.{key}: {pattern!r} {error}", "correct it, or name layers from that list"
        raise LoraError(what, details=[_listing(linear)], fix=fix) from None
    if not hit:
        near = difflib.get_close_matches(pattern, {name.rsplit(".", 1)[-1] for name in names}, n=1)
        fix = f"did you mean {near[0]}?" if near else "choose from that list, or write target_modules: all-linear"
        raise LoraError(f"adapter.{key}: {pattern} matched no layer", details=[_listing(linear)], fix=fix)
    return hit


def _listing(linear: dict[str, nn.Module]) -> str:
    counts = Counter(name.rsplit(".", 1)[-1] for name in linear)
    return "linear layers here: " + ", ".join(f"{name} (×{count})" for name, count in counts.items())


def _in_layers(names: list[str], layers: Sequence[int], blocks: list[str]) -> list[str]:
    def index(name: str) -> int | None:
        for outer in blocks:
            if name.startswith(f"{outer}."):
                return int(name[len(outer) + 1 :].split(".", 1)[0])
        return None

    present = sorted({at for name in names if (at := index(name)) is not None})
    depth = max(present, default=-1) + 1
    wanted = {at: at + depth if at < 0 else at for at in layers}
    absent = [at for at in layers if wanted[at] not in present]
    if absent:
        fix = "no targeted layer is inside a block"
        if present:
            fix = f"blocks with such layers: {present[0]} to {present[-1]}"
        raise LoraError(f"adapter.layers: no adapted layer in block {absent[0]}", fix=fix)
    return [name for name in names if index(name) in wanted.values()]


def _only_projections(model: Any, targets: dict[str, Target], projections: Sequence[str]) -> dict[str, Target]:
    """Targets confined to some of q, k, v, o. A fused layer gets one adapter of full rank per part that is kept.

    Such a layer's B is block-structured, as in loralib's MergedLinear: with q and v kept, columns 0..r-1 feed only q
    and r..2r-1 only v. Rank and alpha grow with the number of parts, so the scaling is what it was.
    """
    parts = output_parts(model, list(targets))
    kept: dict[str, Target] = {}
    for name, target in targets.items():
        rows = {part: parts[name] == part for part in dict.fromkeys(parts[name])}
        wanted = [part for part in rows if part in projections]
        if not wanted:
            continue
        if len(rows) == 1:
            kept[name] = target
            continue
        blocks = [torch.tensor(rows[part]).unsqueeze(1).expand(-1, target.rank) for part in wanted]
        grown = len(wanted)
        kept[name] = Target(name, target.rank * grown, target.alpha * grown, torch.cat(blocks, 1))
    if not kept:
        raise LoraError(f"adapter.projections: {list(projections)} matched no layer", details=[", ".join(targets)])
    return kept
