"""Names of an adapter's tensors: PEFT's, and the same with what training programs leave around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_cli.adapters.kinds import PARTS, kind_of
from lora_cli.errors import LoraError, reading

# torch.compile, FSDP and activation checkpointing wrap modules and leave their names in the saved ones.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"(?:module\.)?(?:base_model\.model\.)?")
# `lora_A.default.weight`: a state dict that was saved without PEFT's saving, with the adapter's name in it
_STEMS = "|".join(re.escape(part.removesuffix(".weight")) for part in sorted(PARTS))
_PART = re.compile(rf"(?P<module>.+)\.(?P<stem>{_STEMS})(?:\.(?P<adapter>(?!weight$)[^.]+))?(?P<end>\.weight)?")
_BASE = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.(?P<last>weight|bias)")
_AGAIN = "copy the adapter again"


def by_module(
    flat: Mapping[str, Tensor], path: Path, config: Mapping[str, Any], elsewhere: str
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
        with reading(f"{key} is of a kind that cannot be computed with", path, _AGAIN):  # such as numbers of 4 bits
            real = tensor.is_floating_point() and bool(tensor.float().isfinite().all())
        if not real:
            raise LoraError(f"{key} holds NaN, infinity or no real numbers", where=str(path), fix=_AGAIN)
        found = _PART.fullmatch(plain)
        if found is None and "lora_" not in plain and (copy := _BASE.fullmatch(plain)):
            base[f"{copy['module']}.{copy['last']}"] = tensor
            continue
        part = f"{found['stem']}{found['end'] or ''}" if found else ""
        if found is None or tensor.ndim != PARTS.get(part) or not tensor.numel():
            what = f"{key} {tuple(tensor.shape)} is not the A or B of a linear layer"
            raise LoraError(what, where=str(path), fix=elsewhere)
        parts = tensors.setdefault(found["module"], {})
        names.add(found["adapter"])
        if part in parts and len(names) == 1:
            raise LoraError(f"{key} is in the file twice, once within a wrapper", where=str(path), fix=_AGAIN)
        if part in parts or len(names) > 1:
            what = f"the file holds more than one adapter: {', '.join(sorted(map(str, names)))}"
            fix = "save one of them alone with PEFT: model.save_pretrained(folder, selected_adapters=[name])"
            raise LoraError(what, where=str(path), fix=fix)
        parts[part] = tensor
    if not tensors:
        raise LoraError("the adapter file holds no tensors of an adapter", where=str(path), fix=_AGAIN)
    half = [name for name, parts in tensors.items() if kind_of(parts, config) is None]
    if half:
        raise LoraError(f"{half[0]} has only one of lora_A and lora_B", where=str(path), fix=_AGAIN)
    return tensors, base
