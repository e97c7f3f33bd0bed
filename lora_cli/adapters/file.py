"""The adapter file: PEFT's two files, adapter tensors only.

Names are PEFT's (`base_model.model.<module>.lora_A.weight`), so PEFT, vLLM and llama.cpp's converter read them. One
alpha holds for every layer, since some of them read no other: where training had several, B carries the ratio. The
safetensors metadata also says which base weights the adapter belongs to, and how they were quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_cli.adapters.attach import attach
from lora_cli.adapters.card import CARD
from lora_cli.adapters.keys import by_module
from lora_cli.adapters.kinds import KINDS, kind_of
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.metadata import FORMAT, AdapterMetadata, read_metadata
from lora_cli.adapters.peft_config import CONFIG, alphas, elsewhere, read_config, require_own, whole_matching
from lora_cli.adapters.targets import linear_layers
from lora_cli.adapters.trained import Trained, trained_modules
from lora_cli.base.device import DTYPES
from lora_cli.base.gguf import is_gguf
from lora_cli.base.linear import is_linear, stored_transposed, unquantized_layers
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import storage_named, storage_of
from lora_cli.base.tensor_files import write_tensors
from lora_cli.errors import LoraError, command, reading
from lora_cli.foreign import Shape

TENSORS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"  # where the Hugging Face libraries look for it
SAVED: Shape = {CONFIG: None, TENSORS: None, CHAT_TEMPLATE: None}  # all that save_adapter writes
FILES: Shape = SAVED | {CARD: None}  # and the card, at the end of a run


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, read and understood, not yet attached to a model.

    config: PEFT's. metadata: what the file says of itself; little, in those of other programs. alphas: by module; the
    scaling is alpha / rank. tensors: by module, as `Trained.to_peft` names them. base_weights: by parameter, copies of
    the base's own, which PEFT adds for embeddings.
    """

    folder: Path
    config: dict[str, Any]
    metadata: AdapterMetadata
    alphas: dict[str, float]
    tensors: dict[str, dict[str, Tensor]]
    base_weights: dict[str, Tensor]

    @property
    def base_model(self) -> str | None:
        return self.metadata.base_model or self.config.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        return self.metadata.base_revision or self.config.get("revision")

    def own_base(self) -> tuple[str, str | None]:
        """The base model that it names, and its revision. Raises LoraError if it names none."""
        if self.base_model is None:
            what = "the adapter does not say which base model it is for"
            raise LoraError(what, where=str(self.folder), fix="name it with --base")
        return self.base_model, None if Path(self.base_model).is_dir() else self.base_revision or None

    def tokenizer_for(self, base: str) -> str | None:
        """The folder whose tokenizer it was trained with, where the base is a GGUF file."""
        return self.metadata.tokenizer if is_gguf(Path(base)) else None

    def kind(self, name: str) -> type[Trained]:
        """The kind of module that a module's tensors belong to."""
        found = kind_of(self.tensors[name], self.config)
        assert found is not None, "by_module lets no others pass"
        own = KINDS.get(self.metadata.method or "")  # one that is stored as another kind, whose function it has
        return own if own is not None and issubclass(own, found) else found

    def target(self, name: str) -> Any:
        """What `attach` makes a module of."""
        return self.kind(name).of_peft(name, self.tensors[name], self.alphas.get(name, 1.0), self.config)


def save_adapter(
    model: Any,
    folder: Path,
    base: BaseSource,
    *,
    quantization: str,
    double_quantization: bool,
    group_size: int | None = None,
    chat_template: str | None = None,
    prompting: str | None = None,
    system: str | None = None,
    made_of: str | None = None,
) -> None:
    """Write the model's adapter into the existing `folder`. chat_template: where it is not the base model's own.

    prompting: whether training went through a chat template, `template` or `raw`. system: its system prompt.
    made_of: see AdapterMetadata.
    """
    layers = trained_modules(model)
    lora = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    alpha = commonest({name: layer.alpha for name, layer in lora.items()})
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, layer in layers.items():
        settings |= layer.peft_settings
        tensors |= {f"base_model.model.{name}.{key}": value for key, value in layer.to_peft(alpha).items()}
    compute = model.get_input_embeddings().weight.dtype
    metadata = AdapterMetadata(
        adapter_format=FORMAT,
        base_model=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        tokenizer=base.tokenizer,
        quantization=quantization,  # type: ignore[arg-type]
        double_quantization=double_quantization,
        group_size=group_size,  # type: ignore[arg-type]
        search=storage_named(quantization).search,
        compute_dtype=next((name for name, dtype in DTYPES.items() if dtype == compute), None),  # type: ignore[arg-type]
        unquantized_modules=_unquantized(model) if quantization != "none" else None,
        method=next(name for name, kind in KINDS.items() if any(type(layer) is kind for layer in layers.values())),
        prompting=prompting,  # type: ignore[arg-type]
        system=system,
        alpha=alpha,
        made_of=made_of,
    )
    write_tensors(folder / TENSORS, dict(sorted(tensors.items())), metadata.as_texts())
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    config = _peft_config(model, lora, base, alpha) | settings
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def put_saved(model: Any, folder: Path) -> None:
    """Give the model's adapter the values that it was saved with in `folder`."""
    _load(trained_modules(model), read_adapter(folder))


def _load(modules: Mapping[str, Trained], saved: AdapterFile) -> None:
    for name, module in modules.items():
        module.load(module.from_peft(saved.tensors[name], saved.alphas.get(name, 1.0)))


def _unquantized(model: Any) -> list[str]:
    return [name.removesuffix(".base_layer") for name in unquantized_layers(model)]


def _peft_config(model: Any, layers: Mapping[str, LoRALinear], base: BaseSource, alpha: float) -> dict[str, Any]:
    dropout = max(layer.dropout for layer in layers.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        **peft_scaling({name: layer.rank for name, layer in layers.items()}, alpha),
        "lora_dropout": dropout,
        "target_modules": _target_modules(model, list(layers)),
        "fan_in_fan_out": any(stored_transposed(layer.base_layer) for layer in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_scaling(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """What adapter_config.json says of ranks and alpha. ranks: by module. alpha: the one of all."""
    rank = commonest(ranks)
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # Ollama reads whole numbers only
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {},
    }


def commonest(values: Mapping[str, Any]) -> Any:
    counts = list(values.values())
    return max(dict.fromkeys(counts), key=counts.count)


def _target_modules(model: Any, adapted: list[str]) -> list[str]:
    """Last parts of names where they mean exactly the adapted layers (as other tools expect), else full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    everything = [name.removesuffix(".base_layer") for name, module in model.named_modules() if is_linear(module)]
    meant = {name for name in everything if name.rsplit(".", 1)[-1] in short}
    return short if meant == set(adapted) else adapted


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter of this program or of PEFT. Raises LoraError for damage or for what cannot be computed."""
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise no_tensors(folder)
    fix = "copy it again, or use an earlier checkpoint"
    with reading("damaged or incomplete adapter file", path, fix), safe_open(path, "pt") as stored:
        texts = stored.metadata() or {}
        flat = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it has keys, but is not a dict
    metadata = read_metadata(texts, path)
    tensors, base_weights = by_module(flat, path, config, elsewhere(folder, config))
    ranks = {name: len(each["lora_A.weight"]) for name, each in tensors.items() if "lora_A.weight" in each}
    alpha = alphas(config, ranks, folder)
    require_own(config, ranks, metadata.alpha, folder)
    return AdapterFile(folder, config, metadata, alpha, tensors, base_weights)


def no_tensors(folder: Path) -> LoraError:
    what, fix = f"the adapter folder has no {TENSORS}", "copy the adapter again"
    if (pickled := folder / "adapter_model.bin").exists():
        what += f": {pickled.name} is pickled and is not opened (pickles can run code)"
        code = (
            "import torch, safetensors.torch as s; "
            f"s.save_file(torch.load({str(pickled)!r}, weights_only=True), {str(folder / TENSORS)!r})"
        )
        fix = f"if you trust it: {command('python', '-c', code)}"
    return LoraError(what, where=str(folder), fix=fix)


def attach_adapter(model: Any, adapter: AdapterFile, base: BaseSource) -> dict[str, Trained]:
    """Attach a stored adapter to its base model.

    Raises LoraError when it was trained on another base (by the base's fingerprint; without one, by names and shapes),
    or when any tensor has no place or any place no tensor.
    """
    require_same_base(adapter, base)
    _require_same_search(model, adapter, base)
    modules = dict(model.named_modules())
    _require_base_weights(model, adapter)
    problems = _misfits(modules, adapter) + _unfilled(model, adapter)
    if problems:
        what = f"the adapter (of {adapter.base_model or 'an unnamed base'}) does not fit {base.name}: "
        what += f"{len(problems)} layers differ"
        fix = "use the base model that it was trained on"
        raise LoraError(what, where=str(adapter.folder), details=problems[:6], fix=fix)
    named = [name for name in modules if name in adapter.tensors]
    layers = attach(model, [adapter.target(name) for name in named])
    for layer in layers.values():
        layer.leave_meta()
    _load(layers, adapter)
    return layers


def require_same_base(adapter: AdapterFile, base: BaseSource) -> None:
    """Raises LoraError if the adapter was trained on another base, by the fingerprint that it may have."""
    if adapter.metadata.base_fingerprint not in (None, base.fingerprint):
        what = f"the adapter was trained on another base model: on {adapter.base_model}, not on {base.name}"
        revision = f" at revision {adapter.base_revision}" if adapter.base_revision else ""
        raise LoraError(what, where=str(adapter.folder), fix=f"use the base model {adapter.base_model}{revision}")


def _require_same_search(model: Any, adapter: AdapterFile, base: BaseSource) -> None:
    """Raises LoraError where the base's weights, as they are held, were chosen in another way for the training."""
    quantization, search = adapter.metadata.quantization, adapter.metadata.search
    kind = storage_named(quantization) if quantization is not None else None
    if kind is None or search == kind.search or base.gguf is not None:  # whose blocks are taken as they are
        return
    if any(storage_of(each) is kind for each in model.modules()):
        what = f"the adapter was trained on {kind.name} weights that another version of lora chose in another way"
        fix = "train it again, or use it with the version that made it"
        raise LoraError(what, where=str(adapter.folder), fix=fix)


def _require_base_weights(model: Any, adapter: AdapterFile) -> None:
    """PEFT adds the base's embeddings when an adapter is on them: read past if they are the base's, else refused."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, own in adapter.base_weights.items():
        there = parameters.get(name)
        if there is None or there.shape != own.shape or not _equal_in_either_dtype(there.cpu(), own):
            raise LoraError(
                f"the adapter brings weights of its own for {name}: trained or resized embeddings, which this program "
                "cannot put into a model",
                where=str(adapter.folder),
                fix=elsewhere(adapter.folder, adapter.config),
            )


def _equal_in_either_dtype(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _misfits(modules: Mapping[str, Any], adapter: AdapterFile) -> list[str]:
    reasons = {name: adapter.kind(name).misfit(modules.get(name), parts) for name, parts in adapter.tensors.items()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]


def _unfilled(model: Any, adapter: AdapterFile) -> list[str]:
    wanted = adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if narrowed or not wanted or wanted == "all-linear":
        return []
    names = list(linear_layers(model))
    if isinstance(wanted, str):
        meant = set(whole_matching(wanted, names, "target_modules", adapter.folder))
    else:
        meant = {name for name in names if any(name == last or name.endswith(f".{last}") for last in wanted)}
    unfilled = [name for name in names if name in meant and name not in adapter.tensors]
    return [f"{name}: in target_modules, but not in the file" for name in unfilled]
