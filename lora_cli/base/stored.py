"""How a checkpoint is stored: as its weights are, or quantized already. Asked by everything that takes a base model."""

from __future__ import annotations

from typing import Any

from lora_cli.base.source import BaseSource
from lora_cli.errors import LoraError

_TRAINABLE = ("nf4", "int8")


def stored_quantization(source: BaseSource) -> str | None:
    """nf4 or int8 as bitsandbytes stores them, another method by its own name, None for plain weights.

    Raises LoraError where config.json says that it is quantized, but not how.
    """
    stated = _stated(source.config)
    if stated is None:
        return None
    kind = stated.get("quant_method") if isinstance(stated, dict) else None
    if isinstance(stated, dict) and stated.get("load_in_4bit"):
        kind = str(stated.get("bnb_4bit_quant_type", "nf4"))
    elif isinstance(stated, dict) and stated.get("load_in_8bit"):
        kind = "int8"
    if not isinstance(kind, str) or not kind:
        raise LoraError(
            "quantization_config in config.json does not say how the weights are stored (quant_method)",
            where=str(source.folder / "config.json"),
            fix="download the model again, or use the unquantized model",
        )
    return kind


def require_quantization(source: BaseSource, quantization: str) -> None:
    """Raises LoraError if the weights are stored in another way than `quantization` asks for."""
    kind = stored_quantization(source)
    if kind in (None, quantization):
        return
    require_trainable(source)
    raise LoraError(
        f"the checkpoint is already quantized ({kind}), but was asked for with quantization: {quantization}",
        where=str(source.folder),
        fix=f"write quantization: {kind} (on the command line --quantization {kind})",
    )


def require_trainable(source: BaseSource) -> None:
    """Raises LoraError if no recipe can train on weights that are stored so, such as GPTQ, AWQ, FP8 or MXFP4."""
    kind = stored_quantization(source)
    if kind is not None and kind not in _TRAINABLE:
        raise LoraError(
            f"the checkpoint is already quantized ({kind}), which cannot be trained on",
            where=str(source.folder),
            fix="use the unquantized model; quantization: nf4 then quantizes it as it is loaded",
        )


def _stated(config: dict[str, Any]) -> Any:
    """What a configuration says of quantization; a composite one may say it of its text alone."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                return part[key]
    return None
