"""Loading the frozen base model and its tokenizer."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lora_cli.base.attention import attention_implementation, watch_rows
from lora_cli.base.bounds import require_modest_tokenizer, require_modest_tokenizer_files, require_own_tokens
from lora_cli.base.gguf import load_state
from lora_cli.base.linear import settle_layers
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import storage_named
from lora_cli.base.stored import require_quantization, stored_quantization
from lora_cli.base.weight_files import stored_tensors
from lora_cli.errors import LoraError, reading, refuse_if

_CHECK_CONFIG = "check config.json, or download it again"


def load_model(
    source: BaseSource,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    double_quantization: bool = True,
    group_size: int = 32,
    trust_remote_code: bool = False,
) -> Any:
    """The base model, frozen, in eval mode, each shard quantized as it is read.

    What is not quantized (embeddings, norms, lm_head) is held in `dtype`. No parameter requires a gradient.
    Raises LoraError for an architecture that is not a causal LM, or weights that do not fit the architecture.
    """
    config = model_config(source, trust_remote_code)
    require_quantization(source, quantization, group_size)
    as_stored = source.gguf is not None or stored_quantization(source) is not None
    if not as_stored:
        _require_real_weights(source)
    settings = None if as_stored else storage_named(quantization).load_settings(dtype, double_quantization, group_size)
    state = None
    if source.gguf is not None:
        state, settings = load_state(source.gguf, quantization, dtype)
    # A damaged config.json can fail anywhere in the code that builds a model.
    with reading("the base model cannot be loaded", source.place, "check config.json, or download the model again"):
        try:
            kind: Any = AutoModelForCausalLM if state is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded: Any = kind.from_pretrained(
                source.folder if state is None else None,
                config=config,
                state_dict=state,
                dtype=dtype,
                device_map={"": device},
                quantization_config=settings,
                attn_implementation=attention_implementation(config),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the names
            )
        except (torch.OutOfMemoryError, MemoryError):
            what = f"{source.name} does not fit into the memory of {device}"
            raise LoraError(what, fix="use quantization: nf4, or a smaller base model") from None
    model, info = loaded
    _require_all_weights(source, info)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    settle_layers(model, dtype)
    model.unused_tensors = sorted(map(str, info["unexpected_keys"]))
    watch_rows(model)
    model.config.use_cache = False
    return model.eval()


def skeleton_of(source: BaseSource, config: Any, trust_remote_code: bool, *, buffers: bool = False) -> Any:
    """The model's modules on the device meta, without weights. Raises LoraError if none can be made of `config`.

    buffers: whether to make them on the CPU, with the values that the model's code gives them.
    """
    from accelerate import init_empty_weights

    with reading("no model can be built from this configuration", source.folder / "config.json", _CHECK_CONFIG):
        with init_empty_weights() if buffers else torch.device("meta"):
            model = build(config, trust_remote_code)
        if buffers:
            model.tie_weights()  # init_empty_weights made a parameter of each of those that are one
        return model


def build(config: Any, trust_remote_code: bool) -> Any:
    """A model with random weights in fp32 and the attention of training. Raises whatever its code raises."""
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=attention_implementation(config),
        trust_remote_code=trust_remote_code,
    )
    watch_rows(model)
    return model


def require_weights_fit(source: BaseSource, config: Any, skeleton: Any) -> None:
    """Raises LoraError, as loading them would, if the weights do not fill the model; from their headers alone.

    Of weights that are stored quantized, the headers do not show the shapes.
    """
    if stored_quantization(source) is not None and source.gguf is None:
        return
    if source.gguf is None:
        _require_real_weights(source)
    names = stored_tensors(source.folder)
    stand_ins = {name: torch.empty(each.shape, dtype=torch.float16, device="meta") for name, each in names.items()}
    with reading("the weights do not fit the configuration", source.place, "download the model again"):
        _, info = type(skeleton).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=stand_ins,
            device_map={"": "meta"},
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _require_all_weights(source, info)


def load_tokenizer(source: BaseSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises LoraError if it has none, if it is not a fast one, or has no end token."""
    fix = "the folder needs the model's own tokenizer.json and tokenizer_config.json; download them again"
    with reading("the tokenizer cannot be loaded", source.place, fix):
        require_modest_tokenizer_files(source.folder)
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not tokenizer.is_fast:
            what = "the tokenizer gives no character offsets (it is not a fast tokenizer)"
            raise LoraError(what, where=source.place)
        require_modest_tokenizer(tokenizer, source.place)
        tried: Any = tokenizer("tried once: a damaged setting can fail as late as this")
        require_own_tokens(tokenizer, tried["input_ids"], source.place)
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end token, so the model could not learn where to stop"
        raise LoraError(what, where=source.place, fix="set eos_token in tokenizer_config.json")
    return tokenizer


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries below; what matters is said by this program."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes", "torch", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"bitsandbytes|transformers|accelerate|torch")


def model_config(source: BaseSource, trust_remote_code: bool) -> Any:
    """The configuration of a causal language model. Raises LoraError for any other, and for an unknown kind."""
    if source.config.get("auto_map") and not trust_remote_code and source.config.get("model_type") is None:
        fix = "read that code, then write trust_remote_code: true"
        raise LoraError(f"{source.name} is defined by Python code of its own", fix=fix)
    kind = source.config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        what, fix = "the model's configuration cannot be read", _CHECK_CONFIG
    else:
        what = f"model type {kind!r} is not known to the installed transformers"
        fix = "upgrade transformers; if the model ships its own code, read it and write trust_remote_code: true"
    with reading(what, source.folder / "config.json", fix):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        architectures = source.config.get("architectures")
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else config.model_type
        fix = "choose a decoder-only model such as Llama, Qwen, Mistral or GPT-2"
        raise LoraError(f"{source.name} ({named}) is not a causal language model", fix=fix)
    _without_dropout(config)
    return config


def _without_dropout(config: Any) -> None:
    """The frozen path never drops: a recipe with dropout 0 then is deterministic, also for GPT-2's built-in 0.1."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif hasattr(value, "model_type"):  # a configuration inside a configuration, such as MPT's attention
            _without_dropout(value)


def _require_real_weights(source: BaseSource) -> None:
    """Raises LoraError for whole numbers in the place of a weight: transformers would take them as they are."""
    for name, own in stored_tensors(source.folder).items():
        what = f"the weight {name} is stored as {own.dtype}, and not as real numbers"
        odd = name.endswith(".weight") and not own.dtype.startswith(("F", "BF"))
        refuse_if(odd, what, where=own.file, fix="download the model again, or name the unquantized one")


def _require_all_weights(source: BaseSource, info: Any) -> None:
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if missing or mismatched:
        what = f"the weights do not fill the model: {len(missing)} tensors missing, {len(mismatched)} of another shape"
        fix = "the checkpoint and config.json do not belong together, or the download is incomplete"
        raise LoraError(what, where=source.place, details=(missing + mismatched)[:5], fix=fix)


def unused_tensors(model: Any) -> list[str]:
    """A sentence on what the checkpoint holds and the model's class has no place for, if anything."""
    unused = getattr(model, "unused_tensors", ())
    shown = ", ".join(unused[:3]) + (" …" if len(unused) > 3 else "")
    what = f"{len(unused)} tensors of the checkpoint are not used, because the model's class has no place for them"
    return [f"{what}: {shown}"] if unused else []
