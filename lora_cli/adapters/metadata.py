"""What an adapter file says of itself: the base it belongs to and how that was held in training.

safetensors keeps texts only, under names that every program may use; `format` is taken (transformers wants "pt" there).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lora_cli.adapters.kinds import KINDS
from lora_cli.errors import LoraError
from lora_cli.quantization import Quantization

FORMAT = 2


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value  # refused by its type


def _a_kind(value: str | None) -> str | None:
    if value is not None and value not in KINDS:
        raise ValueError("it is not a method")
    return value


class AdapterMetadata(BaseModel):
    """Values of adapter_model.safetensors' metadata. None: the adapter was made before this was kept, or elsewhere.

    base_fingerprint: see `weight_files.fingerprint`. tokenizer: a folder, where a GGUF file's own was not used.
    search: see `Storage.search`. compute_dtype: of the base's layers in training.
    unquantized_modules: linear layers that a quantized base held as they are. prompting: through a chat template, or
    raw. system: the system prompt that training put before conversations. alpha: the one of all layers. made_of: of
    which adapters, or which model, it was computed, in words without a path.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    adapter_format: Annotated[Literal[2] | None, BeforeValidator(_from_json)] = None
    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    tokenizer: str | None = None
    quantization: Quantization | None = None
    double_quantization: Annotated[bool | None, BeforeValidator(_from_json)] = None
    group_size: Annotated[Literal[32, 64, 128] | None, BeforeValidator(_from_json)] = None
    search: Annotated[int | None, BeforeValidator(_from_json)] = None
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    unquantized_modules: Annotated[list[str] | None, BeforeValidator(_from_json)] = None
    method: Annotated[str | None, AfterValidator(_a_kind)] = None
    prompting: Literal["template", "raw"] | None = None
    system: str | None = None
    alpha: Annotated[float | None, BeforeValidator(_from_json)] = None
    made_of: str | None = None

    def as_texts(self) -> dict[str, str]:
        """For the file; what is None is left out."""
        values = {key: value for key, value in self.model_dump().items() if value is not None}
        return {"format": "pt"} | {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
        }


def read_metadata(texts: Mapping[str, str], path: Path) -> AdapterMetadata:
    """Raises LoraError for a value that this version does not know: it would change what the adapter means."""
    try:
        return AdapterMetadata.model_validate({key: value for key, value in texts.items() if value != ""})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise LoraError(
            f"the file's metadata has {key}: {texts[key]!r}, which this version of lora does not know",
            where=str(path),
            fix="copy the adapter again; if a newer version of lora made it, use that one",
        ) from None
