"""`lora resize`: the nearest adapter of a smaller rank, layer by layer, and how far it is."""

from __future__ import annotations

from pathlib import Path

from lora_cli.adapters.low_rank import Factors, decomposed, factors_of, holding
from lora_cli.studies.made import Layer, Made, open_part, write_made


def resize(source: str, output: Path, *, rank: int | None, energy: float | None) -> Made:
    """Write an adapter with the largest directions of each layer: `rank` of them, or as many as hold `energy`.

    energy: share of ‖ΔW‖², in each layer. No matrix of a lower rank is nearer (Eckart & Young 1936). Raises LoraError
    for an adapter that is more than A and B, and for an output that cannot be written.
    """
    part = open_part(source, output)
    made: dict[str, Factors] = {}
    layers: list[Layer] = []
    for name in part.pairs:
        A, B = part.factors(name, part.group)
        U, values, V = decomposed(A, B, 1.0)
        norm, most = values.norm().item(), len(values) if rank is None else min(rank, len(values))
        kept = most if energy is None else holding(values[:most], energy, norm)
        made[name] = factors_of(U, values, V, kept)
        layers.append(Layer(name, len(A), kept, norm, values[kept:].norm().item()))
    ranks = {each.name: each.rank for each in layers}
    made_of = f"{part.name}, at a smaller rank"
    write_made(output, [part], ranks, made.__getitem__, made_of=made_of, measured=Made(layers).lines)
    return Made(layers)
