"""What other programs refuse of an adapter, or compute differently without a word: a rule each, with its source.

Read in the programs' own code in November 2026. What only the base model decides (its architecture) is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_cli.adapters.file import TENSORS, no_tensors
from lora_cli.adapters.peft_config import OFF, alphas, changed_base, stored_config
from lora_cli.base.source import BaseSource
from lora_cli.base.weight_files import read_header
from lora_cli.errors import CheckFailed

Program = Literal["vllm", "llama.cpp", "ollama", "mlx", "peft", "transformers"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_VLLM, _LLAMA = (
    "https://github.com/vllm-project/vllm/blob/main/vllm",
    "https://github.com/ggml-org/llama.cpp/blob/master",
)
_OLLAMA = "https://github.com/ollama/ollama/blob/main/convert/convert.go"
_MLX = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/utils.py"
_PEFT = "https://github.com/huggingface/peft/blob/main/src/peft/utils/save_and_load.py"
_MERGE = "merge it, and use the merged folder there: lora merge SOURCE --output FOLDER"
_EXPORT = "make its file with lora export SOURCE --to gguf-adapter --output FILE"
_PLAIN = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight|.+\.base_layer\.weight")
_OF_PEFT = re.compile(r"base_model\.model\..+")


@dataclass(frozen=True)
class Looked:
    """What a program sees of an adapter. ranks: by module. names: of the tensors; none of one that is not trained yet.

    model_type: of the base, where it is known. tied: whether its head shares weights with its embeddings.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    names: Collection[str] = ()
    model_type: str | None = None
    tied: bool = False

    def on(self, *keys: str) -> str:
        """Those settings of adapter_config.json that are not off."""
        return ", ".join(f"{key}: {self.config[key]}" for key in keys if self.config.get(key) not in OFF)

    def odd(self, pattern: re.Pattern[str]) -> str:
        return next((name for name in self.names if not pattern.fullmatch(name)), "")


@dataclass(frozen=True)
class Rule:
    """found: what of an adapter it is about, "" where nothing is. says: what the program does, with {} for that."""

    programs: tuple[Program, ...]
    found: Callable[[Looked], str]
    says: str
    fix: str
    source: str

    def broken(self, looked: Looked) -> dict[str, str] | None:
        about = self.found(looked)
        return {"what": self.says.format(about), "fix": self.fix, "source": self.source} if about else None


def _more_than_llama_cpp_reads(it: Looked) -> str:
    return it.on("use_rslora", "alpha_pattern", "layer_replication", "use_bdlora", "use_qalora") or changed_base(
        it.config
    )


_EVERY_SCALE = "one rank and one alpha for all layers (no adapter.rank_pattern), or " + _MERGE
RULES = (
    Rule(
        ("vllm",),
        lambda it: (
            it.on("use_dora", "modules_to_save", "bias", "lora_bias", "use_qalora", "use_bdlora", "layer_replication")
            or it.on("alora_invocation_tokens")
            or changed_base(it.config)
        ),
        "vLLM refuses an adapter with {}",
        _MERGE,
        f"{_VLLM}/lora/peft_helper.py",
    ),
    Rule(
        ("vllm",),
        lambda it: f"{max(it.ranks.values())}" if max(it.ranks.values(), default=0) > VLLM_RANKS[-1] else "",
        f"rank {{}} is above {VLLM_RANKS[-1]}, the largest that vLLM serves",
        f"train with adapter.rank: {VLLM_RANKS[-1]} or less, or {_MERGE}",
        f"{_VLLM}/config/lora.py",
    ),
    Rule(
        ("vllm",),
        lambda it: it.on("rank_pattern", "alpha_pattern"),
        "vLLM before it read these patterns scales every layer by lora_alpha / r, another model without a word: {}",
        _EVERY_SCALE,
        f"{_VLLM}/lora/peft_helper.py",
    ),
    Rule(
        ("vllm", "llama.cpp", "ollama"),
        lambda it: it.odd(_PLAIN) or ("magnitudes of use_dora" if it.config.get("use_dora") and not it.names else ""),
        "it reads A and B of linear layers under PEFT's names alone, and ends at {}",
        _MERGE,
        f"{_LLAMA}/convert_lora_to_gguf.py and {_VLLM}/lora/utils.py",
    ),
    Rule(
        ("llama.cpp", "ollama"),
        _more_than_llama_cpp_reads,
        "llama.cpp's own converter takes lora_alpha / rank for every scale, another model without a word: {}",
        f"{_EXPORT}, which keeps scales, or {_MERGE}",
        f"{_LLAMA}/src/llama-adapter.h and {_LLAMA}/convert_lora_to_gguf.py",
    ),
    Rule(
        ("llama.cpp", "ollama"),
        lambda it: next((name for name in it.ranks if name.endswith("lm_head")), "") if it.tied else "",
        "the converter refuses {}, as this base has no output head of its own",
        "train without the head (adapter.exclude_modules)",
        f"{_LLAMA}/convert_lora_to_gguf.py",
    ),
    Rule(
        ("ollama",),
        lambda it: it.model_type if it.model_type not in (None, "llama", "mistral", "gemma2") else "",
        "Ollama itself converts adapters of Llama's and Gemma 2's architectures alone, not of {}",
        f"{_EXPORT}, or {_MERGE}",
        _OLLAMA,
    ),
    Rule(
        ("ollama",),
        lambda it: "" if float(it.config.get("lora_alpha", 0)).is_integer() else f"{it.config['lora_alpha']}",
        "Ollama reads lora_alpha as a whole number, and refuses {}",
        f"{_EXPORT}, or {_MERGE}",
        _OLLAMA,
    ),
    Rule(
        ("mlx",),
        lambda it: "" if it.config.get("lora_parameters") else "PEFT's",
        "mlx-lm opens adapters.safetensors with num_layers and lora_parameters, not {} layout",
        "convert it: lora convert SOURCE --to mlx --output FOLDER, or " + _MERGE,
        _MLX,
    ),
    Rule(
        ("peft", "transformers"),
        lambda it: it.odd(_OF_PEFT) or next((each for each in it.names if "_orig_mod." in each), ""),
        "PEFT finds no place for tensors such as {}, and leaves those layers as they began",
        "save it with PEFT's save_pretrained, of the model without wrappers",
        _PEFT,
    ),
)


def refused(looked: Looked, program: Program) -> list[dict[str, str]]:
    """What `program` will refuse or compute differently: what, fix, source."""
    found = (rule.broken(looked) for rule in RULES if program in rule.programs)
    return [each for each in found if each is not None]


def require_taken(looked: Looked, program: Program) -> str:
    """One line for a person where `program` takes the adapter. Raises CheckFailed with every reason where not."""
    if found := refused(looked, program):
        details = [f"{each['what']} ({each['source']})" for each in found]
        fixes = dict.fromkeys(each["fix"] for each in found)
        error = CheckFailed(f"{program} does not take this adapter as it is", details=details, fix="; or ".join(fixes))
        error.result = {"program": program, "refused": found}
        raise error
    largest = max(looked.ranks.values(), default=0)
    told = f", with --max-lora-rank {next(each for each in VLLM_RANKS if each >= largest)}" if program == "vllm" else ""
    return f"{program} takes this adapter{told}; whether it knows the base model is not looked at"


def look_at(folder: Path, base: BaseSource | None = None) -> Looked:
    """An adapter folder, also one that this program cannot compute. Raises LoraError for damage."""
    config, path = stored_config(folder), folder / TENSORS
    if not path.is_file():
        raise no_tensors(folder)
    stored = read_header(path)[0]
    ranks = {name.partition(".lora_A.")[0]: each.shape[0] for name, each in stored.items() if ".lora_A." in name}
    alphas(config, ranks, folder)  # refuses what is not a number
    return Looked(config, ranks, list(stored), *of_base(base))


def of_base(base: BaseSource | None) -> tuple[str | None, bool]:
    """model_type and tied of `Looked`."""
    return (None, False) if base is None else (base.stated("model_type"), bool(base.stated("tie_word_embeddings")))
