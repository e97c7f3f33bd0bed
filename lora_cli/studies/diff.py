"""`lora diff`: what a full fine-tune changed, as an adapter of its base, and what an adapter cannot hold of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.attach import attach
from lora_cli.adapters.card import public_name
from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.layer import Target
from lora_cli.adapters.low_rank import layer_state, nearest
from lora_cli.adapters.targets import linear_layers
from lora_cli.base.linear import stored_transposed
from lora_cli.base.load import load_tokenizer, model_config, require_weights_fit, skeleton_of
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import stored_quantization
from lora_cli.base.tensor_files import is_finite, read_tensor
from lora_cli.base.weight_files import StoredTensor, stored_tensors
from lora_cli.errors import LoraError, escaped, refuse_if
from lora_cli.files import whole_output
from lora_cli.merging.files import require_outside, require_place
from lora_cli.merging.names import Places
from lora_cli.studies.made import Layer, Made, write_card


def diff(
    base: str, tuned: str, output: Path, *, rank: int | None, energy: float | None, trust_remote_code: bool = False
) -> Made:
    """Write the adapter that is nearest to tuned - base in every linear layer; a tensor pair at a time.

    rank: the largest of a layer. energy: as few directions of each as hold this share of ‖ΔW‖². Raises LoraError for
    models whose tensors differ in name or shape, for quantized ones, and where nothing changed.
    """
    place = require_place(output)
    sources = [find_base(name, trust_remote_code=trust_remote_code) for name in (base, tuned)]
    for each in sources:
        require_outside(place, each.folder)
        quantized = stored_quantization(each)
        what = f"the weights are stored in {quantized}, so that their difference is mostly rounding"
        refuse_if(quantized is not None, what, where=each.folder, fix="name the unquantized model")
    one = sources[0]
    config = model_config(one, trust_remote_code)
    model = skeleton_of(one, config, trust_remote_code)
    require_weights_fit(one, config, model)
    pairs = _pairs(model, sources)
    linear = {f"{name}.weight": (name, layer) for name, layer in linear_layers(model).items()}
    layers: list[Layer] = []
    not_held: dict[str, float] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for parameter, (was, now) in pairs.items():
        update = _change(parameter, was, now)
        if update is None:
            continue
        if parameter not in linear:
            not_held[parameter] = torch.linalg.vector_norm(update).item()
            continue
        name, layer = linear[parameter]
        update = update.T.contiguous() if stored_transposed(layer) else update
        factors, norm, lost = nearest(update, rank, energy)
        states[name] = layer_state(factors)
        layers.append(Layer(name, min(update.shape), len(factors[0]), norm, lost))
    refuse_if(not layers, f"no linear layer differs between {base} and {tuned}", fix="compare a model with its base")
    targets = [Target(each.name, each.rank, float(each.rank)) for each in layers]
    for name, module in attach(model, targets).items():
        module.leave_meta()
        module.load(states[name])
    made = Made(layers, _not_held(not_held, layers), {"not_held": not_held})
    size = [f"at rank {rank}"] if rank else []
    size += [f"with {energy:.4g} of the energy of each layer"] if energy else []
    _write(place, model, sources, ", ".join(size), made, trust_remote_code)
    return made


def _not_held(norms: dict[str, float], layers: list[Layer]) -> list[str]:
    """What an adapter cannot hold, in words. norms: ‖Δ‖ of every such tensor."""
    if not norms:
        return []
    outside, inside = (math.hypot(*each) for each in (norms.values(), [each.norm for each in layers]))
    first = sorted(norms, key=lambda name: -norms[name])
    named = f"{', '.join(first[:3])}{f' and {len(first) - 3} more tensors' if len(first) > 3 else ''}"
    share = outside**2 / (outside**2 + inside**2)
    what = f"not in the adapter, as only linear layers can be: {named}, {share:.2%} of ‖Δ‖² of all that changed"
    return [f"{what}; base + adapter lacks what they do"]


def _write(place: Path, model: Any, sources: list[BaseSource], size: str, made: Made, code: bool) -> None:
    one, other = sources
    made_of = f"the change from {public_name(one)} to {escaped(public_name(other))}, {size}"
    own, template = (load_tokenizer(each, trust_remote_code=code).chat_template for each in sources)
    with whole_output(place) as temporary:
        save_adapter(
            model,
            temporary,
            one,
            quantization="none",
            double_quantization=True,
            chat_template=template if isinstance(template, str) and template != own else None,
            made_of=made_of,
        )
        write_card(temporary, one, [f"It is {made_of}.", *made.lines(), *made.notes])


def _pairs(model: Any, sources: list[BaseSource]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Both tensors of every parameter, by its name in the model; of what is stored otherwise, by its stored name.

    Raises LoraError where a name is in one alone, or a shape differs.
    """
    found: list[dict[str, StoredTensor]] = []
    for each in sources:
        stored = stored_tensors(each.folder)
        places = Places.of(model, stored)
        own = {place: stored[name] for name, place in places.direct.items() if place in places.parameters}
        found.append(own | {name: stored[name] for names, _ in places.converted for name in names})
    one, other = found
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:  # one tensor, though some programs store it twice
        name_of = {id(each): name for name, each in model.named_modules()}
        twice, once = (f"{name_of[id(each)]}.weight" for each in (head, embeddings))
        one.pop(twice, None)
        if twice in other and sources[1].stated("tie_word_embeddings") is False:
            one[twice] = one[once]
        else:
            other.pop(twice, None)
    odd = sorted(one.keys() ^ other.keys()) or [name for name in one if one[name].shape != other[name].shape]
    if odd:
        shapes = [str(each[odd[0]].shape) if odd[0] in each else "not there" for each in found]
        what = f"{sources[1].name} is not a fine-tune of {sources[0].name}: {len(odd)} tensors differ in name or shape"
        details = [f"{odd[0]}: {shapes[0]} in {sources[0].name}, {shapes[1]} in {sources[1].name}"]
        raise LoraError(what, details=details, fix="name the base model that was fine-tuned first, then the result")
    return {name: (one[name], other[name]) for name in one}


def _change(name: str, was: StoredTensor, now: StoredTensor) -> Tensor | None:
    """now - was in fp32; None where nothing changed. Raises LoraError for numbers that are not finite."""
    before, after = read_tensor(was), read_tensor(now)
    if not after.is_floating_point() or torch.equal(before.to(after.dtype), after):
        return None
    update = after.float().sub_(before)
    if not is_finite(update):
        raise LoraError(f"{name} holds NaN or infinity", where=now.file, fix="copy the model again")
    return update
