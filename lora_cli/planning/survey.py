"""What a first recipe is made from: what the base model is, without its weights, and what the data are."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lora_cli.base.attention import attention_implementation
from lora_cli.base.load import load_tokenizer, model_config
from lora_cli.base.source import BaseSource, find_base
from lora_cli.data.formats import _USUAL, NEEDED, detect_format
from lora_cli.data.packing import pack
from lora_cli.data.prepare import Preparation, prepare
from lora_cli.data.prepared import PreparedData, open_prepared
from lora_cli.data.readers import Row
from lora_cli.data.sources import FileSource, Source, open_source
from lora_cli.errors import LoraError
from lora_cli.evaluation.packing_check import require_no_leak
from lora_cli.recipe import Recipe, SourceRecipe

# Configuration and tokenizer. The weights of a hub model stay there until it is trained.
_LIGHT = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
_HEAVY = ["*.safetensors", "original/*", "onnx/*", "openvino/*", "*.bin", "*.pth", "*.gguf"]
_TRIED_PARAMETERS = 300_000_000  # of the largest block that is made to see whether examples can share a row

WHOLE_BYTES = 64 * 2**20  # of data files that are tokenized whole, in well under a minute; of larger ones a sample is
SAMPLE_ROWS = 5_000
_READ_ROWS, _READ_BYTES = 1_000_000, 2**30  # what is read of large data, to count rows and to choose the sample from
_HEAD_ROWS = 1_000  # as prepare() looks at
_SHARE_ROWS = 20_000  # whose trained tokens are looked at one by one


# ── the base model ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BaseModel:
    """A causal language model without its weights. skeleton: its modules on the device meta.

    stored: how the checkpoint is quantized already; None as a rule.
    """

    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    config: Any
    skeleton: Any
    stored: str | None
    trust_remote_code: bool

    @property
    def positions(self) -> int | None:
        """The longest example that the model can see, in tokens."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def packs(self) -> bool:
        """Whether examples can share a row, tried on one random block of each kind; training tries it on the model."""
        config = copy.deepcopy(self.config)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = list(dict.fromkeys(kinds))
        config.num_hidden_layers = len(config.layer_types) if kinds else 1
        config.vocab_size = min(config.vocab_size, 64)
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(config, name, None):
                setattr(config, name, min(getattr(config, name), 8))
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in self._made_from(config).parameters())
            if parameters > _TRIED_PARAMETERS:
                return True
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = self._made_from(config)
        except Exception:  # what a cut configuration makes of code that is not ours
            return True
        try:
            require_no_leak(model, torch.device("cpu"))
        except LoraError:
            return False
        return True

    def _made_from(self, config: Any) -> Any:
        return AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention_implementation(config),
            trust_remote_code=self.trust_remote_code,
        )


def look_at_model(name: str, *, trust_remote_code: bool = False) -> BaseModel:
    """Raises LoraError, as loading it would, if it is missing, no causal language model, or has no usable tokenizer."""
    source = _without_weights(name, trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = model_config(source, trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    stored = source.config.get("quantization_config") or {}
    kind = "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else stored.get("quant_method")
    if kind not in (None, "nf4", "int8"):
        raise LoraError(
            f"the checkpoint is already quantized ({kind}), which cannot be trained on",
            where=str(source.folder),
            fix="use the unquantized model",
        )
    return BaseModel(source, tokenizer, config, skeleton, kind, trust_remote_code)


def _without_weights(name: str, trust_remote_code: bool) -> BaseSource:
    """As find_base, but the weights of a hub model are only looked for, not downloaded."""
    from huggingface_hub import file_exists, snapshot_download

    if not Path(name).is_dir() and not name.startswith((".", "/", "~")) and name.count("/") < 2:
        wanted = [*_LIGHT, "*.py"] if trust_remote_code else _LIGHT
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HEAVY))
            source = BaseSource(name, folder, revision=folder.name)
            weights = ("model.safetensors", "model.safetensors.index.json")
            if isinstance(source.config, dict) and (
                any((folder / file).exists() for file in weights)
                or file_exists(name, weights[0], revision=source.revision)
            ):
                return source
        except Exception:  # find_base finds it in the cache, or says what is wrong
            pass
    return find_base(name, trust_remote_code=trust_remote_code)


# ── columns and template ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reading:
    """How rows are to be read. wanted: data.format where it has to be said. shown: the columns, for a person."""

    name: str
    shown: str
    wanted: str = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    why: str = ""


def choose_reading(rows: Sequence[Row]) -> Reading:
    """The format of rows: by their columns, else the richest that fits, else by usual other names of columns.

    Raises LoraError, that of detect_format, if nothing fits.
    """
    present = list(dict.fromkeys(name for row in rows for name in row.values))
    try:
        name = detect_format(rows).name
        return Reading(name, _shown(name, {}, present))
    except LoraError as error:
        fitting = [
            name for name, alternatives in NEEDED.items() if any(set(each) <= set(present) for each in alternatives)
        ]
        if fitting:
            name = fitting[0]  # NEEDED begins with the formats that say most
            others = " and ".join(fitting[1:])
            why = f"the columns fit {others} too; {name} says where the answers are"
            return Reading(name, _shown(name, {}, present), wanted=name, why=why)
        name, columns = _by_usual_names(present)
        if name is None:
            raise error
        why = "what your columns mean here"
        try:
            detect_format(rows, "auto", columns)
        except LoraError:
            return Reading(name, _shown(name, columns, present), name, columns, why)
        return Reading(name, _shown(name, columns, present), "auto", columns, why)


def _by_usual_names(present: Sequence[str]) -> tuple[str | None, dict[str, str | None]]:
    """A format and what its columns are called, where all it needs is there under its own or a usual other name."""

    def called(*meanings: str) -> str | None:
        own = [name for name in meanings if name in present]
        usual = [column for column, meaning in _USUAL.items() if meaning in meanings and column in present]
        return next(iter([*own, *usual]), None)

    asked, answer, more = called("instruction", "prompt"), called("output", "completion"), called("input")
    found: dict[str, str | None]
    if (turns := called("messages", "conversations")) is not None:
        name, found = "chat", {"messages": turns}
    elif asked and answer and (more or asked == "instruction"):  # without its input, a question could not be answered
        name, found = "instruction", {"instruction": asked, "output": answer, "input": more}
    elif asked and answer:
        name, found = "completion", {"prompt": asked, "completion": answer}
    elif (text := called("text")) is not None:
        name, found = "text", {"text": text}
    else:
        return None, {}
    return name, {meaning: column for meaning, column in found.items() if column not in (None, meaning)}


def _shown(name: str, columns: dict[str, str | None], present: Sequence[str]) -> str:
    needed = next((each for each in NEEDED[name] if set(each) <= {*present, *columns}), NEEDED[name][0])
    return " and ".join(str(columns.get(meaning, meaning)) for meaning in needed)


def choose_template(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """A built-in chat template and why, where one is needed and the model has none."""
    if reading.name not in ("chat", "instruction") or tokenizer.chat_template:
        return None
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special >= {"<|im_start|>", "<|im_end|>"}:
        return "chatml", "the model has no chat template, but ChatML's turn marks are among its special tokens"
    name = "alpaca" if reading.name == "instruction" else "plain"
    return name, f"the model has no chat template; {name} needs no special token but the end token"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Sample(FileSource):
    """Some rows of files, in memory."""

    kept: tuple[Row, ...] = ()

    def rows(self) -> Iterator[Row]:
        return iter(self.kept)

    @property
    def identity(self) -> dict[str, str]:  # type: ignore[override]  # hashing the files would read all of them
        return {}


@dataclass
class _OfSample(Preparation):
    sample: _Sample

    @cached_property
    def sources(self) -> list[tuple[SourceRecipe, Source]]:
        return [(self.recipe.data.train[0], self.sample)]


@dataclass(frozen=True)
class DataSurvey:
    """What is known of the data before the recipe is. rows: counted, or where `counted` is false guessed from sizes.

    lengths: tokens of each example that was tokenized, uncut. target_share: of their tokens. distinct: unequal ones.
    """

    source: FileSource
    reading: Reading
    rows: int
    counted: bool
    sample: _Sample | None
    lengths: np.ndarray
    targets: np.ndarray  # of every `stride`-th example
    stride: int
    target_share: float
    distinct: int
    percentiles: dict[str, int]

    @property
    def tokens(self) -> float:
        """Of all rows, the others as long as those of the sample."""
        return float(self.lengths.sum()) * (self.rows / len(self.lengths) if self.sample else 1)

    def densest_row(self, max_seq_len: int, packed: bool) -> int:
        """Most target tokens on one row of at most max_seq_len tokens."""
        lengths = self.lengths[:: self.stride]
        if lengths.max() > max_seq_len:  # some are cut or left out: whatever is left may be trained whole
            return max_seq_len
        if not packed:
            return int(self.targets.max())
        rows = pack(lengths, max_seq_len)
        return int(np.add.reduceat(self.targets[rows.members], [0, *rows.ends[:-1]]).max())


def look_at_rows(path: str) -> tuple[FileSource, Reading]:
    """The files and the format of their rows. Raises LoraError for what cannot be read."""
    source = open_source(SourceRecipe.model_validate({"path": path}))
    assert isinstance(source, FileSource)
    head = list(islice(source.rows(), _HEAD_ROWS))
    return source, choose_reading(head)


def survey_data(recipe: Recipe, source: FileSource, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> DataSurvey:
    """Tokenizes all rows, or of large data a sample. recipe: one that cuts nothing and holds nothing out.

    Raises LoraError with what the gate finds in them.
    """
    sample, rows, counted = _sample_of(source)
    data = prepared(recipe, tokenizer, sample)
    data.findings.require_none()
    stride = -(-len(data.train) // _SHARE_ROWS)
    lengths, summary = data.train.lengths, data.summary.train
    targets = np.array([example.targets for example in data.train[::stride]], np.int64)
    distinct = len(lengths) - data.findings.counts.get("duplicate", 0)
    rows = rows if sample else len(lengths)
    share = summary.target_tokens / summary.tokens
    return DataSurvey(
        source, reading, rows, counted, sample, lengths, targets, stride, share, distinct, summary.percentiles
    )


def prepared(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sample: _Sample | None) -> PreparedData:
    """What prepare() makes of the recipe's data, or of a sample of them; findings are not raised."""
    if sample is None:
        return prepare(recipe, tokenizer, inspect=True)
    temporary = tempfile.TemporaryDirectory(prefix="lora-")
    _OfSample(recipe, tokenizer, sample).build(Path(temporary.name))
    data = open_prepared(Path(temporary.name), kept=temporary)
    assert data is not None
    return data


def _sample_of(source: FileSource) -> tuple[_Sample | None, int, bool]:
    """Rows to tokenize (None: all), how many there are, and whether that was counted."""
    packed = any(path.suffix.lower() in (".gz", ".zst", ".parquet") for path in source.paths)
    size = sum(path.stat().st_size for path in source.paths) * (4 if packed else 1)
    if size <= WHOLE_BYTES:
        return None, 0, True
    most = max(SAMPLE_ROWS, round(_READ_ROWS * min(1.0, _READ_BYTES / size)))
    rng = random.Random(0)
    kept: dict[int, Row] = {}
    at = -1
    rows = source.rows()
    for at, row in enumerate(islice(rows, most)):  # each row is kept with the same chance: Vitter 1985, algorithm R
        place = at if at < SAMPLE_ROWS else rng.randrange(at + 1)
        if place < SAMPLE_ROWS:
            kept[place] = row
    counted = next(rows, None) is None
    read = sum(len(json.dumps(row.values, default=str, ensure_ascii=False)) for row in kept.values()) / len(kept)
    number = at + 1 if counted else max(most, round(size / read))
    order = {str(path): number for number, path in enumerate(source.paths)}
    chosen = sorted(kept.values(), key=lambda row: (order[row.file], row.number))
    return _Sample(source.name, source.paths, tuple(chosen)), number, counted
