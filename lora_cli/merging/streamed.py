"""Base + adapter without the base's weights: modules on the device meta, and each weight read when it is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.file import AdapterFile, attach_adapter
from lora_cli.adapters.metadata import AdapterMetadata
from lora_cli.adapters.trained import ALL, Trained
from lora_cli.base.device import DTYPES
from lora_cli.base.linear import features, stored_transposed
from lora_cli.base.load import model_config, require_weights_fit, skeleton_of
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import is_known, storage_named
from lora_cli.base.stored import dense_tensor, parts_of
from lora_cli.base.tensor_files import Rows, is_finite, some_rows
from lora_cli.base.weight_files import StoredTensor
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.merging.names import Places
from lora_cli.merging.tensors import Fresh

WeightOf = Callable[[nn.Module, str], Tensor | Rows]  # of both, some rows can be taken


def why_whole(adapter: AdapterFile, quantization: str, held: str | None) -> str | None:
    """Why the base model must be opened to merge onto weights held so; None if its files are enough."""
    if adapter.base_weights:
        return "the adapter brings copies of the base's embeddings, which are compared with the model's"
    if not is_known(quantization) or not storage_named(quantization).rounds_alone:
        return f"{quantization} weights are made by the loaded model"
    if quantization == "none" or held is not None:
        return None
    if adapter.metadata.compute_dtype is None or adapter.metadata.unquantized_modules is None:
        return "the adapter does not say how its base was quantized (it was made before that was kept)"
    return None


@dataclass(frozen=True)
class Skeleton:
    """A model on the device meta, with its adapter if any, and what reads its weights.

    rounded: layers whose weights are quantized ones. own: stored tensors by parameter, where one holds it alone. read:
    a stored tensor as numbers.
    """

    model: Any
    places: Places
    stored: Mapping[str, StoredTensor]
    rounded: Collection[str]
    own: Mapping[str, str]
    read: Callable[[str], Tensor]
    weight_of: WeightOf


def skeleton_from_files(
    source: BaseSource,
    adapter: AdapterFile | None,
    stored: Mapping[str, StoredTensor],
    *,
    quantization: str,
    held: str | None,
    trust_remote_code: bool,
) -> Skeleton:
    """quantization: of the weights that the model computes with. held: as the checkpoint stores them.

    Raises LoraError if base, adapter and weight files do not belong together.
    """
    config = model_config(source, trust_remote_code)
    model = skeleton_of(source, config, trust_remote_code, buffers=True)
    require_weights_fit(source, config, model)
    if adapter is not None:
        attach_adapter(model, adapter, source)
    places, parts = Places.of(model, stored), parts_of(stored)
    if held is not None:
        in_blocks = source.gguf.kept(held) if source.gguf is not None else parts
        rounded = {places.direct[name].removesuffix(".weight") for name in in_blocks if name in places.direct}
    elif quantization == "none" or adapter is None:
        rounded = set()
    else:
        rounded = _rounded_layers(model, adapter)
    own = {parameter: name for name, parameter in places.direct.items()}
    rounding = quantization if held is None else "none"
    metadata = adapter.metadata if adapter is not None else AdapterMetadata()

    def read(name: str) -> Tensor:
        return dense_tensor(stored, name, parts)

    def weight_of(layer: nn.Module, name: str) -> Tensor | Rows:
        """As the loaded layer computes with it: (out_features, in_features)."""
        tensor = own[f"{name}.weight"]
        turned = stored_transposed(layer) and tensor not in parts
        if rounding == "none" and tensor not in parts and not turned:
            return Rows(stored[tensor])
        weight = read(tensor).T if turned else read(tensor)
        if rounding == "none":
            return weight
        weight = weight.to(DTYPES[metadata.compute_dtype or "fp32"])
        if name not in rounded:
            return weight
        return storage_named(rounding).rounded(weight.contiguous(), metadata.double_quantization is not False)

    return Skeleton(model, places, stored, rounded, own, read, weight_of)


def fresh_from_files(found: Skeleton) -> tuple[Any, Places, dict[str, Fresh]] | None:
    """The model, its names, and the stored tensors that the merge changes.

    Nothing where a changed weight is not stored as one tensor of its own.
    """
    changes = changed(found.model, found.rounded, found.weight_of)
    one_of = {id(each) for name, each in changes.items() if name in found.own}
    if any(id(each) not in one_of for each in changes.values()):
        return None
    return found.model, found.places, found.places.fresh(changes)


def _rounded_layers(model: Any, adapter: AdapterFile) -> set[str]:
    kept, head = set(adapter.metadata.unquantized_modules or ()), model.get_output_embeddings()
    head = head.base_layer if isinstance(head, Trained) else head
    modules = model.named_modules(remove_duplicate=False)  # of other classes, as Falcon's, none is quantized
    layers = {name: each for name, each in modules if isinstance(each, Conv1D) or type(each) is nn.Linear}
    names = {name.removesuffix(".base_layer") for name, each in layers.items() if each is not head}
    return names - kept


def changed(model: Any, quantized: Collection[str], weight_of: WeightOf) -> dict[str, Fresh]:
    """Of every adapted and every quantized layer, the weight that the merged model has, by parameter name.

    weight_of: gives the weight of a layer without its adapter, by module and name: (out_features, in_features).
    """
    found: dict[str, Fresh] = {}
    made: dict[int, Fresh] = {}  # a layer that several blocks share has several names
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, Trained) and (name not in quantized or name.endswith(".base_layer")):
            continue
        frozen: Any = layer.base_layer if isinstance(layer, Trained) else layer
        shape = features(frozen) if stored_transposed(frozen) else features(frozen)[::-1]
        make = partial(_merged, layer, name, weight_of)
        found[f"{name}.weight"] = made.setdefault(id(layer), Fresh(shape, make))
    return found


def _merged(layer: Any, name: str, weight_of: WeightOf) -> Iterator[Tensor]:
    """In fp32, laid out as the checkpoint stores it, some rows at a time."""
    frozen = layer.base_layer if isinstance(layer, Trained) else layer
    weight, turned = weight_of(frozen, name), stored_transposed(frozen)
    for rows in [ALL] if turned else some_rows(weight.shape):
        with torch.no_grad():
            made = layer.merged(weight[rows], rows) if isinstance(layer, Trained) else weight[rows].float()
        if not is_finite(made):
            fix = "copy adapter and base model again, and train again"
            raise CheckFailed(f"the merged weight of {name} holds NaN or infinity", fix=fix)
        yield made.T if turned else made


def require_own_head(model: Any) -> None:
    """Raises LoraError for an adapter on an output head that is the embeddings' tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, Trained) and head.base_layer.weight is embeddings.weight:
        what = "the adapter changes the output head, which this model shares with its embeddings: "
        fix = "use base and adapter together (lora generate ADAPTER), or train without the head"
        raise LoraError(f"{what}one stored tensor cannot be both", fix=fix)
