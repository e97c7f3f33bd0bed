"""What int4 costs a base, and what is left of an update after merging into 4 bits, on a model off its grid.

    python benchmarks/qa_lora.py [--base build/smollm2-135m-instruct] [--spread 0.1] [--rows 40] [--update 0.01]

Prints two tables. Losses: nats a token of SQL answers on databases that no training row uses, of the base alone.
Updates: random, with `--update` of the weight's norm, on all layers of three blocks; the error of a merged weight over
the norm of the update, root mean square over layers. Everything in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from off_grid import move_off_grid
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from lora_cli.base.linear import dense_weight, held_bytes
from lora_cli.base.load import load_model, load_tokenizer, quiet_libraries
from lora_cli.base.source import find_base
from lora_cli.base.storage.int4 import dequantize, quantize, with_offsets
from lora_cli.merging.calibrate import calibrate

HOLD = [("none", 32), ("int8", 32), ("int4", 32), ("rounded", 32), ("int4", 64), ("int4", 128), ("nf4", 32)]
HOLD += [("prose", 32), ("rows", 32)]  # int4 of what `lora calibrate` wrote, with this text
RANK = 16


def loss_of(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Tensor:
    """(rows, 2): summed loss and tokens of each answer."""
    found = []
    for row in rows:
        prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        found.append([F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item(), len(answer)])
    return torch.tensor(found, dtype=torch.float64)


def rounded(weight: Tensor, size: int = 32) -> Tensor:
    """The usual way into Q4_1, and its like for larger groups: from the least to the greatest weight."""
    groups = weight.reshape(-1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    m, d = low.half().float(), ((high - low) / 15).half().float()
    q = ((groups - m) / d.clamp(min=1e-12)).round().clamp(0, 15)
    return (q * d + m).view_as(weight)


def update(weight: Tensor, columns: int, share: float) -> Tensor:
    """A random B A of rank 16, of that share of the weight's norm."""
    made = torch.randn(weight.shape[0], RANK) @ torch.randn(RANK, columns)
    repeated = weight.shape[1] // columns
    return made * (share * weight.norm() / (made.norm() * repeated**0.5))


def errors_of(weight: Tensor, share: float, size: int) -> dict[str, float]:
    packed, d, m = quantize(weight, size)
    base = dequantize(packed, d, m)
    change, delta = update(weight, d.shape[1], share), update(weight, weight.shape[1], share)
    kept = base + change.repeat_interleave(size, 1)
    own = with_offsets(base, d, m, (m.float() + change).half())
    merged = {
        "QA-LoRA merged into m": (own, kept),
        "QA-LoRA merged into m, in bf16": (own.bfloat16().float(), kept),
        "LoRA merged, then 4 bits by rounding": (rounded(base + delta, size), base + delta),
        "LoRA merged, then 4 bits by least squares": (dequantize(*quantize(base + delta, size)), base + delta),
    }
    return {name: ((made - wanted).norm() / (share * weight.norm())).item() for name, (made, wanted) in merged.items()}


def round_layers(model: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """The model with every linear layer of its blocks in 4 bits."""
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = how(layer.weight.data)
    return model


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({key: row[key] for key in ("prompt", "completion")}) + "\n" for row in rows))
    return path


def main() -> None:
    from text_to_sql import make_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/smollm2-135m-instruct"))
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--update", type=float, default=0.01)
    given = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        move_off_grid(given.base, Path(folder) / "off", spread=given.spread)
        source = find_base(str(Path(folder) / "off"))
        tokenizer, rows = load_tokenizer(source), make_rows(given.rows, 0, held_out=True)
        text = Path(folder) / "rows.txt"
        text.write_text("\n\n".join(row["prompt"] + row["completion"] for row in make_rows(160, 1, held_out=False)))

        def opened(kind: str, size: int) -> Any:
            if kind == "rounded":
                return round_layers(opened("none", size), rounded)
            of = source
            if kind in ("prose", "rows"):
                calibrate(source.name, Path(folder) / kind, text=text if kind == "rows" else None, group_size=size)
                of, kind = find_base(str(Path(folder) / kind)), "int4"
            return load_model(of, quantization=kind, dtype=torch.float32, device=torch.device("cpu"), group_size=size)

        plain = opened("none", 32)
        names = [f"model.layers.{at}." for at in (0, len(plain.model.layers) // 2, len(plain.model.layers) - 1)]
        some = [m for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name.startswith(tuple(names))]
        weights = [dense_weight(layer).float() for layer in some]
        for size in (32, 64, 128):
            found = [errors_of(weight, given.update, size) for weight in weights if weight.shape[1] % size == 0]
            print(f"\nupdates of {given.update:.1%} of {len(found)} weights, groups of {size}")
            for name in found[0]:
                mean = sum(each[name] ** 2 for each in found) / len(found)
                print(f"  {name:42} error {mean**0.5:7.1%} of the update, {mean:8.2%} of its energy")
        of_rounding = [((rounded(w) - w).norm() / w.norm()).item() for w in weights]
        of_squares = [((dequantize(*quantize(w)) - w).norm() / w.norm()).item() for w in weights]
        print(f"\nerror of weights: {sum(of_rounding) / len(weights):.2%} by rounding, ", end="")
        print(f"{sum(of_squares) / len(weights):.2%} by least squares", flush=True)
        start = time.process_time()
        for layer in plain.model.layers.modules():
            if isinstance(layer, nn.Linear):
                quantize(layer.weight.data)
        print(f"quantizing all layers: {time.process_time() - start:.1f} s of processor time", flush=True)
        base = None
        for kind, size in HOLD:
            model = plain if kind == "none" else opened(kind, size)
            losses, tokens = loss_of(model, tokenizer, rows).unbind(1)
            base = losses if base is None else base
            cost = (losses - base) / tokens.sum()
            half = 1.96 * (cost - cost.mean()).square().sum().sqrt().item()
            named = {"int4": f"int4, groups of {size}", "rounded": "4 bits by rounding"}
            named |= {"prose": "int4, calibrated", "rows": "int4, calibrated on training rows"}
            name = named.get(kind, kind)
            print(
                f"  {name:34} {losses.sum() / tokens.sum():.4f} ({cost.sum():+.3f} ± {half:.3f}), "
                f"{held_bytes(model) / 2**20:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
