"""Names of an adapter's tensors: PEFT's, and the same with what training programs leave around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_cli.errors import LoraError

# torch.compile, FSDP and activation checkpointing wrap modules and leave their names in the saved ones.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"(?:module\.)?(?:base_model\.model\.)?")
# `lora_A.default.weight`: a state dict that was saved without PEFT's saving, with the adapter's name in it
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_BASE = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.(?P<last>weight|bias)")
_AGAIN = "copy the adapter again"


def by_module(
    flat: Mapping[str, Tensor], path: Path, elsewhere: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module and then by name within it (`lora_A.weight`); and copies of the base's parameters by name.

    Raises LoraError for any other tensor. elsewhere: the fix for what only PEFT can compute.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    names: set[str | None] = set()
    for key, tensor in flat.items():
        plain = _WRAPPERS.sub("", key)
        plain = plain[_PREFIX.match(plain).end() :]  # type: ignore[union-attr]
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise LoraError(f"{key} holds NaN, infinity or no real numbers", where=str(path), fix=_AGAIN)
        found = _LORA.fullmatch(plain)
        if found is None and "lora_" not in plain and (copy := _BASE.fullmatch(plain)):
            base[f"{copy['module']}.{copy['last']}"] = tensor
            continue
        if found is None or tensor.ndim != 2 or not tensor.numel():
            raise LoraError(
                f"{key} {tuple(tensor.shape)} is not the A or B of a linear layer", where=str(path), fix=elsewhere
            )
        pair, part = tensors.setdefault(found["module"], {}), f"{found['part']}.weight"
        names.add(found["adapter"])
        if part in pair or len(names) > 1:
            raise LoraError(
                f"the file holds more than one adapter: {', '.join(sorted(map(str, names)))}",
                where=str(path),
                fix="save one of them alone with PEFT: model.save_pretrained(folder, selected_adapters=[name])",
            )
        pair[part] = tensor
    if not tensors:
        raise LoraError("the adapter file holds no tensors of an adapter", where=str(path), fix=_AGAIN)
    half = [name for name, pair in tensors.items() if len(pair) != 2]
    if half:
        raise LoraError(f"{half[0]} has only one of lora_A and lora_B", where=str(path), fix=_AGAIN)
    return tensors, base
