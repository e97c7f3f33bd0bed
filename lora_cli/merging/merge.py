"""`lora merge`: add each adapter's update to its base weight and write an ordinary Hugging Face folder.

What the update is added to matters. An adapter trained on a 4-bit base corrects that base, rounding errors included:
added to the dequantized weights (`onto="trained"`, the default) the result is the model that was trained; added to
the original weights (`onto="original"`) it is another model, perhaps better, never measured in training. Either way
the difference from base + adapter is measured on real or random tokens, and said.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.file import AdapterFile, read_adapter
from lora_cli.adapters.layer import LoRALinear, adapters_disabled, lora_layers
from lora_cli.adapters.opened import Opened, adapter_folder, open_model
from lora_cli.base.linear import dense_weight, features, is_linear, stored_transposed
from lora_cli.errors import CheckFailed, LoraError
from lora_cli.files import require_space, written_whole

_KEPT_AT_LEAST = 0.9  # share of the adapter's effect that a merge onto the trained weights must keep
_NOISE = 2e-3  # KL below which 16-bit arithmetic alone can explain a difference, nats a token


@dataclass(frozen=True)
class MergeReport:
    """How near the merged model is to base + adapter, over the tokens that were compared.

    kl: mean KL divergence in nats a token from base + adapter to the merged model. adapter_effect: the same from
    base + adapter to the base alone, the yardstick. top1_agreement: share of positions with the same likeliest token.
    """

    output: str
    onto: str
    dtype: str
    layers: int
    tokens_compared: int
    kl: float
    adapter_effect: float
    top1_agreement: float

    @property
    def kept(self) -> float:
        """Share of the adapter's effect that the merge keeps; 1 is all of it."""
        return 1 - self.kl / self.adapter_effect if self.adapter_effect > 0 else 1.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.kept}


def merge(
    source: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "trained",
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge the adapter of a run folder or adapter folder into its base and write the model to `output`.

    dtype: of the written weights; nothing means bf16. Works on the CPU, one layer at a time after loading.
    Raises CheckFailed, leaving `output` as it was, if the written model does not compute what base + adapter computes.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LoraError("the output already exists", where=str(output), fix="choose another --output, or remove it")
    stored = read_adapter(adapter_folder(source))
    quantization = stored.quantization if stored.quantization is not None else "none"
    written = dtype or "bf16"
    opened = open_model(
        base,
        source,
        quantization=quantization,
        dtype=_arithmetic(written),
        device="cpu",
        trust_remote_code=trust_remote_code,
    )
    require_space(output, _written_bytes(opened.model, written), "the merged model")
    tokens = _comparison_tokens(source, opened)
    reference = _log_probabilities(opened.model, tokens)
    with adapters_disabled(opened.model):
        effect = _divergence(reference, _log_probabilities(opened.model, tokens))
    _require_number(effect, stored)
    layers = len(lora_layers(opened.model))
    if onto == "original" and quantization != "none":
        opened = open_model(
            base,
            source,
            quantization="none",
            dtype=_arithmetic(written),
            device="cpu",
            trust_remote_code=trust_remote_code,
        )
    with written_whole(output) as place:
        _write(opened, place, written, trust_remote_code)
        del opened
        merged = _log_probabilities(_reopen(place, written, trust_remote_code), tokens)
        report = MergeReport(
            output=str(output),
            onto=onto if quantization != "none" else "original",
            dtype=written,
            layers=layers,
            tokens_compared=len(reference),
            kl=_divergence(reference, merged),
            adapter_effect=effect,
            top1_agreement=(reference.argmax(-1) == merged.argmax(-1)).float().mean().item(),
        )
        _require_same(report, stored)
    return report


def _arithmetic(written: str) -> str:
    return "fp32" if written == "fp32" else "auto"


def _written_bytes(model: Any, dtype: str) -> int:
    count = 0
    for module in model.modules():
        if is_linear(module) and not isinstance(module, LoRALinear):
            count += features(module)[0] * features(module)[1]
        else:
            count += sum(p.numel() for p in module.parameters(recurse=False))
    return count * (4 if dtype == "fp32" else 2) + 50_000_000


def _write(opened: Opened, place: Path, dtype: str, trust_remote_code: bool) -> None:
    model, target = opened.model, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with torch.no_grad():
        _fuse(model, target)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.to(target)
    # The configuration as the base ships it: loading changed what concerns this program alone.
    model.config = AutoConfig.from_pretrained(
        opened.source.folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    vars(model.config).pop("quantization_config", None)
    model.config.dtype = target
    model.save_pretrained(place)
    opened.tokenizer.save_pretrained(place)


def _fuse(model: Any, dtype: torch.dtype) -> None:
    """Replace every adapted or quantized layer by a plain one of the kind that the checkpoint format expects."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear) or is_linear(m)]:
        adapted = isinstance(layer, LoRALinear)
        if not adapted and type(layer) in (nn.Linear, Conv1D):
            continue
        if name.endswith(".base_layer"):
            continue  # its LoRALinear has been replaced already
        frozen = layer.base_layer if adapted else layer
        weight = dense_weight(frozen).float()  # (out, in)
        if adapted:
            weight = weight + layer.delta_weight()
        if not torch.isfinite(weight.to(dtype)).all():
            raise CheckFailed(f"the merged weight of {name} is not finite in {dtype}", fix="use --dtype bf16 or fp32")
        model.set_submodule(name, _plain_layer(frozen, weight.to(dtype)))


def _plain_layer(frozen: nn.Module, weight: Tensor) -> nn.Module:
    out_features, in_features = weight.shape
    bias = getattr(frozen, "bias", None)
    with torch.device("meta"):
        plain = (
            Conv1D(out_features, in_features)
            if stored_transposed(frozen)
            else nn.Linear(in_features, out_features, bias is not None)
        )
    plain.weight = nn.Parameter(weight.T.contiguous() if stored_transposed(frozen) else weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.data, requires_grad=False)
    return plain


def _reopen(place: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The written model, opened as a stranger would: by transformers alone."""
    compute = torch.float32 if dtype == "fp32" else None
    return AutoModelForCausalLM.from_pretrained(
        place, dtype=compute or "auto", trust_remote_code=trust_remote_code, local_files_only=True
    ).eval()


def _comparison_tokens(source: Path, opened: Opened, most: int = 512) -> Tensor:
    """(1, tokens): the start of the run's own validation or training data where there is a run, else random ids."""
    from lora_cli.data.prepare import prepare
    from lora_cli.recipe_file import load_recipe

    recipe_file = next((p / "recipe.yaml" for p in (source, source.parent) if (p / "recipe.yaml").is_file()), None)
    if recipe_file is not None:
        recipe = load_recipe(recipe_file)
        try:
            data = prepare(recipe, opened.tokenizer)
        except LoraError:
            pass  # the data has moved on since; random tokens compare models too
        else:
            ids = [int(token) for example in (data.validation or data.train)[:64] for token in example.ids][:most]
            return torch.tensor([ids[: _longest(opened.model)]])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(opened.model.config.vocab_size, (1, min(256, _longest(opened.model))), generator=generator)


def _longest(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 10**9


@torch.inference_mode()
def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """(tokens, vocabulary), fp32."""
    return model(input_ids=tokens.to(model.device), use_cache=False).logits[0].float().log_softmax(-1)


def _divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference ‖ other) in nats a token."""
    return (reference.exp() * (reference - other)).sum(-1).mean().clamp_min(0).item()


def _require_same(report: MergeReport, adapter: AdapterFile) -> None:
    _require_number(report.kl, adapter)
    if report.onto == "original" and adapter.quantization not in (None, "none"):
        return  # the user asked for another model than the trained one; the report says how different it is
    if report.kl > _NOISE and report.kept < _KEPT_AT_LEAST:
        raise CheckFailed(
            f"the merged model does not compute what base + adapter computes: KL {report.kl:.2g} nats a token, "
            f"while the adapter itself changes {report.adapter_effect:.2g}",
            where=report.output,
            fix="nothing was written; try --dtype fp32, and report this",
        )


def _require_number(divergence: float, adapter: AdapterFile) -> None:
    """A comparison with nan is never true, so no limit would be passed."""
    if not math.isfinite(divergence):
        raise CheckFailed(
            "base + adapter compute what is no number: their weights are damaged, or too large",
            where=str(adapter.folder),
            fix="nothing was written; copy the adapter and download the base model again",
        )
