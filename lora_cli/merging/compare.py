"""Whether a merged model computes what base + adapter compute: on the same tokens, in fp32 where memory allows it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.base.device import DTYPES, free_memory_bytes
from lora_cli.base.linear import is_quantized, plain_layer, settle_layers
from lora_cli.base.source import BaseSource
from lora_cli.base.text import positions, vocabulary
from lora_cli.base.weight_files import StoredTensor
from lora_cli.errors import reading
from lora_cli.merging.tensors import FLOATS

_MOST_TOKENS = 512
_KEY = re.compile(r"[0-9a-f]{20}")  # a folder of prepared data


def fits_in_fp32(parameters: int, vocabulary: int, *, held_besides: float = 0.0) -> bool:
    """Whether this machine has room for the model in fp32 and for log probabilities of base, adapter and merge.

    held_besides: bytes a parameter that the quantized model takes meanwhile.
    """
    needed = (4 + held_besides) * parameters + _MOST_TOKENS * vocabulary * 16 + 2**30
    return needed < 0.9 * free_memory_bytes(torch.device("cpu"))


def make_dense(model: Any) -> None:
    """Turn every quantized layer into a plain one with the weights it computes with, and all the model into fp32."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(name, plain_layer(layer, torch.float32))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.float()


def reopened(place: Path, *, fp32: bool, trust_remote_code: bool) -> Any:
    """The written model, opened as a stranger would: by transformers alone. Raises LoraError if it does not open.

    fp32: whether it computes in fp32, with the weights that it has; else as its settings say.
    """
    what = "the merged model, with the settings of its base, does not open in transformers"
    with reading(what, fix="correct config.json and generation_config.json of the base model, and merge again"):
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=torch.float32 if fp32 else "auto",
            device_map={"": "cpu"},
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        ).eval()
    settle_layers(model, model.dtype)
    if fp32:
        make_dense(model)
    return model


def comparison_tokens(source: Path, model: Any) -> tuple[Tensor, str]:
    """(1, tokens), and what they are: held-out rows that a run folder keeps prepared, else random ids.

    No data file is opened and no hub asked; what was prepared for other data than the run's is not taken.
    """
    longest = positions(model.config) or _MOST_TOKENS
    ids = _prepared_ids(source)[: min(_MOST_TOKENS, longest)]
    if len(ids) > 1 and min(ids) >= 0 and max(ids) < vocabulary(model.config):
        return torch.tensor([ids]), "of the run's own data"
    generator = torch.Generator().manual_seed(0)
    count = max(2, min(256, longest))
    return torch.randint(vocabulary(model.config), (1, count), generator=generator), "drawn at random"


def _prepared_ids(run: Path) -> list[int]:
    data = prepared_data(run)
    examples = (data.validation or data.train)[:64] if data is not None else []
    return [int(token) for example in examples for token in example.ids]


def prepared_data(run: Path) -> Any:
    """What a run folder keeps prepared of its own data; None if nothing."""
    from lora_cli.data.store import open_prepared

    try:
        expected = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data_fingerprint"]
        folders = [each for each in (run / "prepared").iterdir() if _KEY.fullmatch(each.name) and not each.is_symlink()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    for folder in folders:
        data = open_prepared(folder)
        if data is not None and data.fingerprint == expected:
            return data
    return None


@torch.inference_mode()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """(tokens, vocabulary), fp32. The model is on the CPU."""
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference ‖ other) of logits, in nats a token; NaN where either holds NaN."""
    total = 0.0
    for pair in zip(reference, other, strict=True):  # a row at a time: double takes much memory
        one, two = (each.double().log_softmax(-1) for each in pair)
        total += float((one.exp() * (one - two)).sum())
    return 0.0 if total < 0 else total / len(reference)


def dtype_of(source: BaseSource, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that a checkpoint's dense weights have: what config.json says, else what most of them are stored in."""
    named = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    known = named.get(str(source.stated("dtype", "torch_dtype")))
    return commonest_dtype(stored) if known is None else known


def commonest_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Of the checkpoint's floating-point tensors, by their size."""
    sizes: Counter[str] = Counter()
    for each in stored.values():
        if each.dtype in FLOATS:
            sizes[each.dtype] += each.size_bytes
    return FLOATS[sizes.most_common(1)[0][0]] if sizes else torch.bfloat16
