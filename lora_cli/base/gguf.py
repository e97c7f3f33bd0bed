"""A GGUF file as a base model: its configuration, its tokenizer, and its tensors under Hugging Face's names.

The file is a stranger's: its header is read first, within bounds (gguf_header.py). Configuration and tokenizer are then
transformers' own reading, put into a folder of this process, which the rest of the program takes for the model's.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lora_cli.base.bounds import require_modest_config
from lora_cli.base.gguf_header import AGAIN, Header, library, read_header
from lora_cli.base.storage.blocks import BLOCK, LAYERS, settings_class
from lora_cli.base.storage.int4 import of_q4_0, of_q4_1
from lora_cli.base.storage.kind import Storage
from lora_cli.base.storage.q8_0 import of_q8_0
from lora_cli.base.storage.registry import AS_IN_FILE, INT4, PLAIN
from lora_cli.base.tensor_files import read_bytes
from lora_cli.base.weight_files import StoredTensor, stand_for
from lora_cli.ending import make_temporary
from lora_cli.errors import LoraError, command, reading, refuse_if
from lora_cli.files import require_regular

# Whose rows, names and numbers were compared with the original model's (tests/test_gguf.py). Others read as well with
# transformers, but order or shift weights in ways that were not.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Of what a file says of its architecture: what is read. Anything else would make another model of it.
_READ = {f"attention.{name}" for name in ("head_count", "head_count_kv", "layer_norm_rms_epsilon", "key_length")}
_READ |= {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base"}
_READ |= {"attention.value_length", "rope.dimension_count", "tensor_data_layout"}  # held to the others, or idle
# What llama.cpp needs, too: without it transformers would take a number of its own.
_NEEDED = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
_NEEDED += ["attention.layer_norm_rms_epsilon"]
# Types of blocks that are held as they are: by which kind of layer, and what makes its parts of their bytes.
KEPT: dict[str, tuple[Storage, Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "Q4_0": (INT4, of_q4_0),
    "Q4_1": (INT4, of_q4_1),
    "Q8_0": (AS_IN_FILE, of_q8_0),
}
_DENSE = ("F32", "F16", "BF16")
_TOKENIZERS = ("gpt2", "llama")  # byte pairs and sentencepiece


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """dtype: GGUF's type. shape: of the weight, (out_features, in_features). place: puts rows into Hugging Face's order
    (llama.cpp orders those of q and k in another way)."""

    in_blocks: ClassVar = True

    place: Callable[[np.ndarray], np.ndarray] = np.asarray

    def read(self) -> Tensor:
        """The numbers that its blocks encode, in fp32."""
        gguf = library()
        raw = np.frombuffer(read_bytes(self), np.uint8).reshape(*self.shape[:-1], -1)
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType[self.dtype])
        return torch.from_numpy(np.array(self.place(values.reshape(self.shape)), np.float32))

    def blocks(self) -> tuple[Tensor, ...]:
        """The parts of a layer that holds the very same blocks."""
        raw = np.frombuffer(read_bytes(self), np.uint8).reshape(self.shape[0], -1)
        return KEPT[self.dtype][1](torch.from_numpy(np.array(self.place(raw))))


@dataclass(frozen=True)
class GgufFile:
    """folder: with configuration and tokenizer. linear: the type of each linear layer but the head, by the name of its
    weight. notes: what a person should hear."""

    folder: Path
    tensors: dict[str, StoredTensor]
    linear: dict[str, str]
    notes: tuple[str, ...]

    def kept(self, quantization: str) -> dict[str, Storage]:
        """How layers are held whose blocks stay as they are, by the names of their weights."""
        if quantization == PLAIN.name:
            return {}
        return {name: KEPT[of][0] for name, of in self.linear.items() if of in KEPT}

    def ways(self) -> list[str]:
        """The quantizations that keep its blocks, the one of least choice first; none where no kind holds them."""
        types = {*self.linear.values()}
        if not types & KEPT.keys() or types - KEPT.keys() - {*_DENSE}:
            return []
        four_bits = all(of in KEPT and KEPT[of][0] is INT4 for of in types)
        return [INT4.name, AS_IN_FILE.name] if four_bits else [AS_IN_FILE.name]

    def types(self) -> str:
        """For a person: how many layers are stored in which type."""
        return ", ".join(f"{count} in {name}" for name, count in Counter(self.linear.values()).most_common())


def is_gguf(file: Path) -> bool:
    """By its name, or by its first bytes: Ollama keeps files under names like sha256-0a1b."""
    if file.suffix.lower() == ".gguf" or not file.is_file():
        return file.suffix.lower() == ".gguf"
    with reading("this file cannot be read", file, "check its permissions"), file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def open_gguf(file: Path, tokenizer: str | None) -> GgufFile:
    """Raises LoraError for a file that is damaged, or holds a model or tokenizer that cannot be trained on.

    tokenizer: a folder whose tokenizer to use in place of the file's.
    """
    require_regular(file)
    state = file.stat()
    own = Path(tokenizer).expanduser().resolve() if tokenizer is not None else None
    return _opened(file.resolve(), own, state.st_mtime_ns, state.st_size)


@cache  # a command asks several times; the folder goes when the process ends
def _opened(file: Path, tokenizer: Path | None, *_: int) -> GgufFile:
    library()
    with reading("the GGUF file is damaged or incomplete", file, AGAIN):
        header = read_header(file)
    known = header.scalars.get("general.architecture")
    if known not in ARCHITECTURES:
        what = f"GGUF files of the architecture {str(known)[:40]!r} cannot be trained on"
        what += f"; those of {', '.join(ARCHITECTURES)} can"
        raise LoraError(what, where=file, fix="use the model it was made from: a folder or hub id with safetensors")
    first = file.with_name(re.sub(r"-\d{5}-of-", "-00001-of-", file.name))
    fix = f"make one file of them: {command('llama-gguf-split', '--merge', first, 'whole.gguf')}"
    what = "this is one part of a model that is split into several GGUF files"
    refuse_if(header.scalars.get("split.count", 1) != 1, what, where=file, fix=fix)
    what = f"this is not a model's file: it has no {_EMBEDDINGS}"
    refuse_if(_EMBEDDINGS not in header.tensors, what, where=file, fix="name the model's own GGUF file, or its folder")
    require_modest_config({k: v for k, v in header.scalars.items() if "token" not in k}, file, list(header.tensors))
    folder = make_temporary() / file.name
    folder.mkdir()
    notes: list[str] = []
    with reading("the GGUF file's model cannot be read", file, AGAIN):
        config = _config(header, file, folder)
        tensors, linear = _placed(header, file, config)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder)
    else:
        with reading(
            "the GGUF file's tokenizer cannot be read", file, "write tokenizer: FOLDER, of the original model"
        ):
            notes += _write_tokenizer(header, file, folder)
    stand_for(folder, tensors)
    return GgufFile(folder, tensors, linear, tuple(notes))


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────


def _config(header: Header, file: Path, folder: Path) -> Any:
    """transformers' configuration of what the file says, also as config.json. Its reader sees a file of scalars alone,
    because it takes seconds for the words of a tokenizer."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    gguf, architecture = library(), header.scalars["general.architecture"]
    scaling = header.scalars.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":  # transformers leaves it out
        raise LoraError(
            f"its positions are scaled ({str(scaling)[:40]}), which is not read from GGUF", where=file, fix=AGAIN
        )
    named = [*header.scalars.items(), *header.lengths.items()]
    for name in (name for name, value in named if value and name.startswith(f"{architecture}.")):
        known = name.removeprefix(f"{architecture}.") in _READ or name.endswith(".rope.scaling.type")
        refuse_if(not known, f"it says {name[:80]}, which is not read from GGUF", where=file, fix=AGAIN)
    given = {name.removeprefix(f"{architecture}."): value for name, value in header.scalars.items()}
    for name in [*_NEEDED, *({"rope.freq_base"} & given.keys())]:
        value = given.get(name, 0)
        sound = type(value) in (int, float) and 0 < value < math.inf
        what = f"its {name} is {value}, which cannot be" if name in given else f"it does not say its {name}"
        refuse_if(not sound, what, where=file, fix=AGAIN)
    short = folder / "header.gguf"
    writer = gguf.GGUFWriter(short, architecture)
    for name, value in header.scalars.items():
        if name.startswith(f"{architecture}.") or name in _IDS:
            kind = gguf.GGUFValueType.get_type(value) if isinstance(value, str | float | bool) else None
            writer.add_key_value(name, value, kind or gguf.GGUFValueType.INT64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = AutoConfig.from_pretrained(folder, gguf_file=short.name, local_files_only=True)
    short.unlink()
    config.head_dim = given.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    for name in ("attention.value_length", "rope.dimension_count"):
        refuse_if(
            given.get(name, config.head_dim) != config.head_dim,
            f"its {name} is {given.get(name)}, not that of a head ({config.head_dim}), which is not read from GGUF",
            where=file,
            fix=AGAIN,
        )
    if (scaled := header.tensors.get(_ROPE)) is not None:
        _set_llama_3_positions(config, scaled, file)
    config.vocab_size = header.tensors[_EMBEDDINGS][1][0]
    for name, id in ((name, header.scalars[name]) for name in _IDS & header.scalars.keys()):
        what = f"its {name} is {id}, and it has {config.vocab_size:,} tokens"
        refuse_if(not 0 <= id < config.vocab_size, what, where=file, fix=AGAIN)
    config.tie_word_embeddings = "output.weight" not in header.tensors
    config.dtype = torch.bfloat16  # of a merged model
    of: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [of.__name__]
    config.save_pretrained(folder)
    return config


def _set_llama_3_positions(config: Any, of: tuple[str, tuple[int, ...], int, int], file: Path) -> None:
    """The scaling of Llama 3.1 and later, of which a file holds the factors alone. Raises LoraError for any other."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, _, first, size = of
    with file.open("rb") as stream:
        stream.seek(first)
        factors = np.frombuffer(stream.read(size), np.float32)
    plain, dims = config.rope_parameters, config.head_dim
    theta = float(plain["rope_theta"])
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all that Meta made
    config.rope_parameters = parameters
    own = frequencies / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    same = kind == "F32" and own.shape == factors.shape and np.allclose(own.numpy(), factors, rtol=1e-5)
    what = f"its positions are scaled ({_ROPE}) in another way than those of Llama 3, which is not read from GGUF"
    refuse_if(not same, what, where=file, fix=AGAIN)


_ROPE, _EMBEDDINGS = "rope_freqs.weight", "token_embd.weight"
_IDS = {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")}


def _placed(header: Header, file: Path, config: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by Hugging Face's names, and the types of linear layers. Raises LoraError for one without a name."""
    from transformers import AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as theirs

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    gguf, architecture = library(), header.scalars["general.architecture"]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    own, names = gguf.get_tensor_name_map(kind, config.num_hidden_layers), {}
    for name in model.state_dict():
        stem, _, last = name.rpartition(".")
        names[f"{own.get_name(stem)}.{last}"] = name
    ordered = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config.to_dict())
    found = {name: each for name, each in header.tensors.items() if name != _ROPE}
    strange = [name for name in found if name not in names]
    if strange:
        what = f"{len(strange)} tensors of the file have no place in the model, the first is {strange[0][:80]}"
        raise LoraError(what, where=file, fix="use the model it was made from: a folder or hub id with safetensors")
    tensors: dict[str, StoredTensor] = {}
    for name, (of, shape, first, size) in found.items():
        place = lambda values, name=name: ordered.process(values, name=name).weights  # noqa: E731
        tensors[names[name]] = GgufTensor(file, of, shape, first, first + size, place)
    head = model.get_output_embeddings()
    wanted = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted = {name: shape for name, shape in wanted.items() if name != "lm_head.weight"}
    wrong = [name for name, shape in wanted.items() if name not in tensors or tensors[name].shape != shape]
    what = f"{len(wrong)} tensors of the model that it describes are not in the file, or have another shape"
    refuse_if(bool(wrong), f"{what}, the first is {min(wrong, default='')}", where=file, fix=AGAIN)
    layers = {f"{name}.weight": each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return tensors, {
        name: tensors[name].dtype for name, layer in layers.items() if layer is not head and name in tensors
    }


def load_state(file: GgufFile, quantization: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """What the model's parameters are loaded from, kept blocks and numbers in `dtype`; and the settings for that."""
    state: dict[str, Tensor] = {}
    kept = file.kept(quantization)
    with reading("the GGUF file cannot be read", next(iter(file.tensors.values())).file, AGAIN):
        for name, tensor in file.tensors.items():
            if name in kept:
                parts = zip(LAYERS[kept[name].name].names, tensor.blocks(), strict=True)  # type: ignore[attr-defined]
                state |= {name.removesuffix("weight") + part: value for part, value in parts}
            else:
                state[name] = tensor.read().to(dtype)  # type: ignore[attr-defined]
    kinds = {name.removesuffix(".weight"): kind.name for name, kind in kept.items()}
    return state, settings_class()(kinds=kinds) if kinds else None


def require_kept(file: GgufFile, quantization: str, group_size: int) -> None:
    """Raises LoraError where a recipe asks for weights that the file does not give."""
    ways, where = file.ways(), next(iter(file.tensors.values())).file
    if quantization not in (PLAIN.name, *ways):
        of_it = {
            INT4.name: "Q4_0 and Q4_1",
            AS_IN_FILE.name: f"{', '.join(KEPT)} and the numbers of {', '.join(_DENSE)}",
        }
        what = f"the weights of a GGUF file are not held in {quantization}"
        if quantization in of_it:
            what = f"{quantization} keeps {of_it[quantization]}, but the file's linear layers are {file.types()}"
        fix = f"write quantization: {ways[0]}, which keeps its blocks as they are" if ways else _NO_BLOCKS
        if quantization == INT4.name and ways:
            fix += " (qa_lora needs Q4_1 or Q4_0: other blocks have no offsets)"
        raise LoraError(what, where=where, fix=fix)
    refuse_if(
        quantization == INT4.name and group_size != BLOCK,
        f"the blocks of a GGUF file have {BLOCK} weights, not {group_size}",
        where=where,
        fix=f"write group_size: {BLOCK}",
    )


_NO_BLOCKS = f"write quantization: none, which makes numbers of all; or make a file in {', '.join(KEPT)}"


# ── the tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────


def _copy_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    from lora_cli.base.bounds import require_modest_tokenizer_files

    refuse_if(not source.is_dir(), "no such folder", where=source, fix="name a folder with tokenizer.json as tokenizer")
    with reading("the tokenizer cannot be loaded", source, "name a folder with tokenizer.json as tokenizer"):
        require_modest_tokenizer_files(source)
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def _write_tokenizer(header: Header, file: Path, folder: Path) -> list[str]:
    """As transformers makes it of the file. What is known of its faithfulness, for a person."""
    from transformers import PreTrainedTokenizerFast

    kind = header.scalars.get("tokenizer.ggml.model")
    if kind not in _TOKENIZERS:
        raise ValueError(f"its kind is {str(kind)[:40]!r}")
    made: Any = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    made.save_pretrained(folder)
    if made.eos_token_id is None:
        raise ValueError("it has no end token, so that the model could not learn where to stop")
    split = header.scalars.get("tokenizer.ggml.pre", "default")
    return [
        f"the tokenizer was made from the GGUF file (its rule for splitting text is called {str(split)[:40]}) and not "
        "compared with llama.cpp's; tokenizer: FOLDER takes that of the original model"
    ]
