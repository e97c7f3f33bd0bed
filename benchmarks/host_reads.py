"""Where a training step makes the host wait for the device: every read of a value, with its place.

    python benchmarks/host_reads.py [SETTING=VALUE ...]      settings as for `lora train --set`

It trains a tiny Llama on the CPU, with the code that a GPU runs: a stand-in takes the place of the variable-length
kernel. On a GPU each read stops the host until the device has done all that was asked of it, and then the device waits
for the host. 4 micro-batches a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
# Operations whose result, or its shape, the host has to know.
READING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero",
    "_unique2", "unique_consecutive", "unique_dim", "bincount",
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Within this mode, counts the places below `under`, as `file:line` and operation, that read a value."""

    def __init__(self, under: Path = ROOT / "lora_cli") -> None:
        super().__init__()
        self.under = under
        self.places: Counter[str] = Counter()
        self._with = ExitStack()

    def __enter__(self) -> Any:
        for name in ("tolist", "numpy", "__array__"):  # past the dispatcher where the tensor is on the host
            self._with.enter_context(patch.object(Tensor, name, self._noted(name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._with.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = [each for each in args[1] if each is not None] if name in ("index", "index_put", "index_put_") else []
        moved = name in ("_to_copy", "copy_") and result.device.type != args[name == "copy_"].device.type
        if name in READING or moved or any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            self._note(name)
        return result

    def _noted(self, name: str) -> Callable[..., Any]:
        own = getattr(Tensor, name)

        def call(tensor: Tensor, *given: Any, **named: Any) -> Any:
            self._note(name)
            return own(tensor, *given, **named)

        return call

    def _note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-2] if "torch" not in Path(frame.filename).parts]
        own = [frame for frame in frames if self.under in Path(frame.filename).parents]
        if own:
            by = "" if own[-1] is frames[-1] else f" in {frames[-1].name}"
            self.places[f"{Path(own[-1].filename).relative_to(self.under)}:{own[-1].lineno} {what}{by}"] += 1


def without_waiting(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *_: Any, scale: float, **named: Any) -> Tensor:
    """Stands in for the kernel: attention within each example, by a mask that no value is read for.

    q, k, v: (tokens, heads, head_dim). ends: (examples + 1,).
    """
    at = torch.arange(len(q))
    example = torch.searchsorted(ends[1:].long(), at, right=True)
    back = at[:, None] - at
    mask = (example[:, None] == example) & (back >= 0)
    left = named["window_size"][0]
    mask &= back <= (left if left >= 0 else len(q))
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=named["enable_gqa"])
    return out[0].transpose(0, 1)


@contextmanager
def reads_of_steps() -> Iterator[list[Counter[str]]]:
    """Within this block training takes a GPU's way; collects the reads of each step."""
    from lora_cli.base import attention
    from lora_cli.training import loop

    found: list[Counter[str]] = []
    one_step: Any = loop.Run._one_step

    def watched(*given: Any) -> None:
        with HostReads() as reads:
            one_step(*given)
        found.append(reads.places)

    with (
        patch.object(attention, "varlen_attn", without_waiting),
        patch.object(attention, "varlen_fits", lambda *_: True),
        patch.object(loop.Run, "_one_step", watched),
    ):
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    arguments = parser.parse_args()
    from rich.console import Console

    from lora_cli.base.load import quiet_libraries
    from lora_cli.recipe import load_recipe
    from lora_cli.training.train import train

    sys.path.insert(0, str(ROOT / "scripts"))
    from tiny_model import save_tiny
    from transformers import LlamaConfig

    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        model = save_tiny(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=512, eos_token_id=0), folder / "model")
        rows = [{"prompt": f"What is {n} plus {n}?", "completion": f" {n + n}"} for n in range(1024)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "base_model": str(model),
            "device": "cpu",
            "dtype": "fp32",
            "quantization": "none",
            "adapter": {"rank": 4, "target_modules": "all-linear"},
            "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": 64},
            "train": {"max_steps": 3, "micro_batch_size": 2, "gradient_accumulation_steps": 4},
            "output": str(folder / "run"),
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        with reads_of_steps() as steps:
            train(load_recipe(folder / "recipe.yaml", arguments.settings), Console(stderr=True, quiet=True))
    for place, count in sorted(steps[1].items()):
        print(f"{count:4}  {place}")
    print(f"{steps[1].total():4}  in step 2")


if __name__ == "__main__":
    main()
