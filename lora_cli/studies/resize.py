"""`lora resize`: the nearest adapter of a smaller rank, layer by layer, and how far it is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.file import CHAT_TEMPLATE, TENSORS, commonest, peft_scaling, read_adapter
from lora_cli.adapters.low_rank import decomposed, pairs_of, peft_tensors
from lora_cli.adapters.opened import adapter_folder, adapter_template
from lora_cli.adapters.peft_config import CONFIG
from lora_cli.base.tensor_files import write_tensors
from lora_cli.errors import home_expanded, refuse_if
from lora_cli.files import written_whole
from lora_cli.merging.files import require_place


@dataclass(frozen=True)
class ResizedLayer:
    """norm: ‖ΔW‖ before. lost: ‖ΔW - ΔW'‖, the root of the energy of the directions that were left out."""

    name: str
    was: int
    rank: int
    norm: float
    lost: float


def resize(source: str, output: Path, *, rank: int | None, energy: float | None) -> list[ResizedLayer]:
    """Write an adapter with the largest directions of each layer: `rank` of them, or as many as hold `energy`.

    energy: share of ‖ΔW‖², in each layer. No matrix of a lower rank is nearer (Eckart & Young 1936). Raises LoraError
    for an adapter that is more than A and B, and for an output that cannot be written.
    """
    folder = adapter_folder(Path(home_expanded(source)))
    place = require_place(output)
    inside = place.resolve().is_relative_to(folder.resolve())
    refuse_if(inside, "the output is inside the adapter's folder", where=output, fix="choose another --output")
    adapter = read_adapter(folder)
    more = adapter.metadata.method not in (None, "lora") or bool(adapter.base_weights)
    fix = "merge it as it is: lora merge ADAPTER --output FOLDER"
    refuse_if(
        more, "this adapter is more than A and B of free choice, which a resize would lose", where=folder, fix=fix
    )
    made: dict[str, tuple[Tensor, Tensor]] = {}
    layers: list[ResizedLayer] = []
    for name, (A, B) in pairs_of(adapter, fix=fix).items():
        U, values, V = decomposed(A, B, adapter.alphas[name] / len(A))
        held = values.square().cumsum(0)
        most = len(values) if rank is None else min(rank, len(values))
        kept = most if energy is None else int(torch.searchsorted(held, energy * held[-1]).clamp(max=most - 1)) + 1
        root = values[:kept].sqrt()
        made[name] = (root[:, None] * V[:kept], U[:, :kept] * root)
        layers.append(ResizedLayer(name, len(A), kept, math.sqrt(held[-1]), values[kept:].norm().item()))
    ranks = {each.name: each.rank for each in layers}
    alpha = float(commonest(ranks))
    tensors = peft_tensors({name: (A, B * (len(A) / alpha)) for name, (A, B) in made.items()})  # scaling: alpha / rank
    config = adapter.config | peft_scaling(ranks, alpha) | {"use_rslora": False, "init_lora_weights": True}
    with written_whole(place) as temporary:
        metadata = adapter.metadata.model_copy(update={"alpha": alpha}).as_texts()
        write_tensors(temporary / TENSORS, tensors, metadata)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (template := adapter_template(folder)) is not None:
            (temporary / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return layers


def as_dict(layers: list[ResizedLayer]) -> dict[str, Any]:
    """For --json. error: ‖ΔW - ΔW'‖ / ‖ΔW‖ of the whole adapter."""
    norm, lost = (math.hypot(*(getattr(each, name) for each in layers)) for name in ("norm", "lost"))
    return {"error": lost / norm if norm else 0.0, "norm": norm, "layers": [asdict(each) for each in layers]}


def result_lines(layers: list[ResizedLayer]) -> list[str]:
    worst = max(layers, key=lambda each: each.lost / each.norm if each.norm else 0.0)
    before, after = (sorted({getattr(each, name) for each in layers}) for name in ("was", "rank"))
    said = [" to ".join(map(str, dict.fromkeys((each[0], each[-1])))) for each in (before, after)]
    most = worst.lost / worst.norm if worst.norm else 0.0
    return [
        f"{len(layers)} layers from rank {said[0]} to rank {said[1]}",
        f"‖ΔW - ΔW'‖ / ‖ΔW‖: {as_dict(layers)['error']:.2%} in all, at most {most:.2%}, in {worst.name}",
    ]
