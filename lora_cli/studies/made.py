"""An adapter that is computed from others, layer by layer: what `lora resize` and `lora combine` read and write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_cli.adapters.card import CARD, USE, model_card, public_name
from lora_cli.adapters.file import CHAT_TEMPLATE, TENSORS, AdapterFile, commonest, peft_scaling, read_adapter
from lora_cli.adapters.low_rank import Factors, pairs_of
from lora_cli.adapters.opened import adapter_folder, adapter_template
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.source import BaseSource
from lora_cli.base.tensor_files import Entry, put_bytes, write_entries
from lora_cli.errors import LoraError, escaped, home_expanded, refuse_if
from lora_cli.files import whole_output
from lora_cli.merging.files import require_outside_adapter, require_place

_MERGE = "merge it as it is: lora merge ADAPTER --output FOLDER"
_SAID = ("quantization", "prompting", "system")  # of the metadata: a person hears where they differ
_ROUNDING = 1e-5  # of ‖ΔW‖
_NARROWED = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))


@dataclass(frozen=True)
class Layer:
    """was, rank: before and after. norm: ‖ΔW‖ of what was wanted. lost: ‖ΔW - ΔW'‖, what the rank has no room for."""

    name: str
    was: int
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Made:
    """What was written. notes: what a person should hear of it first. facts: for --json, beside the rest."""

    layers: Sequence[Layer]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def norm(self, name: str) -> float:
        """`norm` or `lost` of the whole adapter."""
        return math.hypot(*(getattr(each, name) for each in self.layers))

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ of the whole adapter."""
        return self.norm("lost") / self.norm("norm") if self.norm("norm") else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        layers = [asdict(each) for each in self.layers]
        return {"error": self.error, "norm": self.norm("norm"), "layers": layers, "notes": self.notes} | self.facts

    def lines(self) -> list[str]:
        worst = max(self.layers, key=lambda each: each.error)
        before, after = (sorted({getattr(each, name) for each in self.layers}) for name in ("was", "rank"))
        said = ["–".join(map(str, dict.fromkeys((each[0], each[-1])))) for each in (before, after)]
        most = f"{self.error:.2%} in all, at most {worst.error:.2%}, in {worst.name}"
        return [
            f"{len(self.layers)} layers from rank {said[0]} to rank {said[1]}",
            f"‖ΔW - ΔW'‖ / ‖ΔW‖: {most if worst.error > _ROUNDING else 'none but the rounding of fp32'}",
        ]


@dataclass(frozen=True)
class Part:
    """An adapter that goes into another, `weight` times. name: of its folder, without what leads there.

    group: how many neighbouring columns of each A are equal, as QA-LoRA stores them; 1 of others.
    """

    adapter: AdapterFile
    name: str
    weight: float
    pairs: dict[str, Factors]
    group: int

    def shape(self, layer: str) -> tuple[int, int, int]:
        """rank, in_features, out_features."""
        A, B = self.pairs[layer]
        return len(A), A.shape[1], len(B)

    def factors(self, layer: str, group: int) -> Factors:
        """A (rank, in / group) and B (out, rank) with weight · ΔW = B A; in groups, with the same norm."""
        A, B = self.pairs[layer]
        scaling = self.weight * self.adapter.alphas[layer] / len(A)
        return math.sqrt(group) * A[:, ::group].float(), scaling * B.float()


def open_part(source: str, output: Path | None, weight: float = 1.0) -> Part:
    """Raises LoraError for an adapter that is more than A and B of linear layers, and for an output inside of it."""
    folder = adapter_folder(Path(home_expanded(source)))
    if output is not None:
        require_place(output)
        require_outside_adapter(output, folder)
    adapter = read_adapter(folder)
    brings = "it brings weights of its own, such as embeddings, and is more than A and B of linear layers"
    refuse_if(bool(adapter.base_weights), brings, where=folder, fix=_MERGE)
    pairs, group = pairs_of(adapter, fix=_MERGE), 1
    if adapter.metadata.method == "qa_lora":
        group = adapter.metadata.group_size or 1
        for name, (A, _) in pairs.items():
            spread = A[:, ::group].repeat_interleave(group, 1)
            odd = spread.shape != A.shape or not torch.equal(spread, A)
            what = f"{name}: its A is not constant within groups of {group}, as qa_lora trains it"
            refuse_if(odd, what, where=folder, fix="copy the adapter again")
    place = folder.resolve()
    name = place.parent.name if place.name == "adapter" else place.name
    return Part(adapter, escaped(name), weight, pairs, group)


def require_one_base(parts: Sequence[Part]) -> None:
    """Raises LoraError for other fingerprints, other names where there are none, or other shapes of a layer."""
    fix = "name adapters of one base; an update means nothing on other weights"
    for one, other in combinations(parts, 2):
        prints = {each.adapter.metadata.base_fingerprint for each in (one, other)}
        names = [each.adapter.base_model for each in (one, other)]
        same_name = None in names or len({Path(str(each)).name for each in names}) == 1
        if (None in prints and not same_name) or (None not in prints and len(prints) > 1):
            what = f"{other.name} is for another base model than {one.name}: {names[1]}, not {names[0]}"
            raise LoraError(what, where=other.adapter.folder, fix=fix)
        for name in one.pairs.keys() & other.pairs.keys():
            if one.shape(name)[1:] != other.shape(name)[1:]:
                own, its = (each.shape(name)[:0:-1] for each in (one, other))
                what = f"{name}: the update of {one.name} is {own}, that of {other.name} {its}"
                raise LoraError(what, where=other.adapter.folder, fix=fix)


def common_group(parts: Sequence[Part]) -> int:
    """The group that the columns of all A have in common; 1 where they differ."""
    groups = {each.group for each in parts}
    return groups.pop() if len(groups) == 1 else 1


def write_made(
    output: Path,
    parts: Sequence[Part],
    ranks: Mapping[str, int],
    make: Callable[[str], Factors],
    *,
    made_of: str,
    measured: Callable[[], Sequence[str]],
) -> list[str]:
    """Write an ordinary adapter in fp32, a layer at a time; returns what a person should hear of its settings.

    ranks: by layer. make: A and B of a layer, with A in `common_group`s and B A the whole update. made_of: for the
    metadata. measured: for the card, once all is written. Raises LoraError for numbers too large for fp32.
    """
    place = require_place(output)
    config, metadata, template, notes = _settings(parts, ranks, made_of)
    shapes = {name: part.shape(name)[1:] for part in parts for name in part.pairs}
    group = common_group(parts)
    held: dict[str, Tensor] = {}

    def write_A(name: str, out: BinaryIO) -> None:
        A, B = make(name)
        A = (A / math.sqrt(group)).float().repeat_interleave(group, 1)
        held[name] = B = (B * (ranks[name] / config["lora_alpha"])).float()  # the scaling is alpha / rank
        wrong = not A.isfinite().all() or not B.isfinite().all()
        refuse_if(wrong, f"{name}: the update is too large for fp32", fix="choose smaller weights")
        put_bytes(A, out)

    def write_B(name: str, out: BinaryIO) -> None:
        put_bytes(held.pop(name), out)

    entries = []
    for name in sorted(ranks):
        inputs, outputs = shapes[name]
        for key, shape, write in (("A", (ranks[name], inputs), write_A), ("B", (outputs, ranks[name]), write_B)):
            full = f"base_model.model.{name}.lora_{key}.weight"
            entries.append(Entry(full, "F32", shape, 4 * shape[0] * shape[1], partial(write, name)))
    with whole_output(place) as temporary:
        write_entries(temporary / TENSORS, entries, metadata)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if template is not None:
            (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        named = config.get("base_model_name_or_path") or "an unnamed base"
        base = BaseSource(named, Path(named), config.get("revision"))
        write_card(temporary, base, [f"It is {made_of}.", *measured(), *notes])
    return notes


def write_card(folder: Path, base: BaseSource, said: Sequence[str]) -> None:
    """README.md of an adapter that was computed. said: of what, and what was measured."""
    use = USE.format(base=public_name(base))
    card = model_card(base, library="peft", relation="adapter", said=said, settings={}, use=use, made="computed")
    (folder / CARD).write_text(card, encoding="utf-8")


def _settings(
    parts: Sequence[Part], ranks: Mapping[str, int], made_of: str
) -> tuple[dict[str, Any], dict[str, str], str | None, list[str]]:
    """adapter_config.json, metadata, chat template; and in words what is left out because the parts do not agree."""
    adapters = [each.adapter for each in parts]
    first, alpha, notes = adapters[0], float(commonest(ranks)), []
    own = [each.metadata.model_dump() for each in adapters]
    same = {key: value for key, value in own[0].items() if all(each[key] == value for each in own)}
    of_base = ("base_model", "base_revision", "base_fingerprint")
    same |= {key: next((each[key] for each in own if each[key] is not None), None) for key in of_base}
    for key in _SAID:
        if key not in same:
            said = " and ".join(dict.fromkeys(str(each[key]) for each in own))
            notes.append(f"{key} differs between the adapters ({said}): the result records none")
    methods = {each.metadata.method for each in adapters}
    same["method"] = methods.pop() if len(methods) == 1 and common_group(parts) == parts[0].group else "lora"
    metadata = first.metadata.model_validate(same | {"alpha": alpha, "made_of": made_of})
    templates = {adapter_template(each.folder) for each in adapters}
    if len(templates) > 1:
        notes.append("the chat template differs between the adapters: the result brings none")
    config = first.config | peft_scaling(ranks, alpha) | {"use_rslora": False, "init_lora_weights": True}
    if ranks.keys() != first.tensors.keys():
        wanted: list[Any] = [each.config.get("target_modules") for each in adapters]
        plain = all(isinstance(each, list) for each in wanted) and not any(
            each.config.get(key) for each in adapters for key in _NARROWED
        )  # each is on all the layers that its list means, so that together they are on those of all lists
        config |= {"target_modules": sorted({*chain(*wanted)} if plain else ranks)} | _NARROWED
    named = {"base_model_name_or_path": "base_model", "revision": "base_revision"}
    for key, ours in named.items():
        config[key] = next((value for each in adapters if (value := getattr(each, ours)) is not None), None)
    return config, metadata.as_texts(), templates.pop() if len(templates) == 1 else None, notes
