"""The recipe: every setting of a run, declared once.

The reference table in the docs, the JSON Schema and all error messages are generated from these fields and the text
below each, which is what it means.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from lora_cli.quantization import DEFAULT, Quantization

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _number_from_text(value: Any) -> Any:
    """PyYAML reads `1e-4` as text (YAML 1.1 wants `1.0e-4`); a person means the number."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


MOST_SAMPLES = 50
_MOST = 10**9  # of anything counted; more is a slip of the keyboard, and no machine gets there
Number = Annotated[float, BeforeValidator(_number_from_text)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class AdapterRecipe(Section):
    method: Literal["lora", "qa_lora"] = "lora"
    """`lora`; or `qa_lora` on quantization: int4, which learns one number a group of inputs in A, so that the merged
    model is the 4-bit base with other offsets (Xu et al. 2023)."""
    rank: int = Field(16, ge=1, le=_MOST)
    """Rank r of the update B @ A of each adapted layer."""
    alpha: Number = Field(32.0, gt=0, le=1e6)
    """Strength of the update: B @ A is scaled by alpha / rank (Hu et al. 2021, section 4.1)."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank, so that large ranks learn as fast as small ones (Kalajdzievski 2023)."""
    dropout: Number = Field(0.0, ge=0, lt=1)
    """Probability of dropping an input of the LoRA path; the frozen path never drops."""
    target_modules: str | list[str] = "attention"
    """Layers to adapt: `attention` (found by structure), `all-linear`, a list of module names or last parts of names,
    or one regular expression for full module names."""
    projections: list[Literal["q", "k", "v", "o"]] = Field(["q", "k", "v", "o"], min_length=1)
    """With `target_modules: attention`: which projections to adapt. Works inside fused layers too; the LoRA paper
    adapts [q, v]."""
    exclude_modules: list[str] = []
    """Module names, last parts of names or regular expressions to leave out."""
    layers: list[int] | None = Field(None, min_length=1)
    """Indices of the transformer blocks to adapt; negative ones count from the end. null: all."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=_MOST)]] = {}
    """Another rank for some modules: name, last part of a name, or regular expression → rank."""
    alpha_pattern: dict[str, Annotated[Number, Field(gt=0, le=1e6)]] = {}
    """Another alpha for some modules: name, last part of a name, or regular expression → alpha."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts (B is zero): Kaiming-uniform as in PEFT and loralib, or Gaussian with deviation 1 / rank."""


FIELDS = (  # what a row can mean; `data.columns` says where each is found
    *("text", "prompt", "completion", "instruction", "input", "output", "messages", "conversations", "tools"),
    *("system", "history", "role", "content", "train", "weight"),
)
OTHER_FIELDS = {  # other names of fields: as a completion has them, and as an instruction
    **dict.fromkeys(("question", "user"), ("prompt", "instruction")),
    **dict.fromkeys(("answer", "assistant"), ("completion", "output")),
}
OF_INSTRUCTIONS = ("instruction", "input", "output", "system", "history")  # fields
Columns = dict[str, str | None]
Format = Literal["auto", "text", "completion", "instruction", "chat"]
TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
OWN = ("format", "columns", "train_on", "system")  # what a source may say for itself


def _canonical(columns: Columns, form: str) -> Columns:
    """Fields under their own names. Where both are given the other name stays, and is refused as a contradiction.

    Whether input and output are those of an instruction is only known with the rows: data/columns.py.
    """
    instruction = form == "instruction" or not columns.keys().isdisjoint(OF_INSTRUCTIONS)
    names = {name: OTHER_FIELDS[name][instruction] for name in columns if name in OTHER_FIELDS}
    taken = [names.get(name, name) for name in columns]
    return {name if taken.count(own := names.get(name, name)) > 1 else own: column for name, column in columns.items()}


class SourceRecipe(Section):
    """One source of rows: local files or a data set of the hub."""

    path: str | None = Field(None, min_length=1)
    """A data file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .md; text kinds also .gz or .zst), a folder of
    them, or a glob."""
    hub: str | None = Field(None, min_length=1)
    """A data set of the Hugging Face hub: owner/name."""
    config: str | None = None
    """Hub only: which configuration of the data set."""
    split: str = Field("train", min_length=1)
    """Hub only: which split of the data set."""
    revision: str | None = None
    """Hub only: branch, tag or commit. null: main."""
    weight: Number = Field(1.0, gt=0, le=1000)  # each row comes that often in the order
    """How often an epoch sees each row: 2 is twice, 0.5 is one half of the rows, chosen by the seed. In a stream: how
    often it comes, against the others."""
    format: Format | None = None
    """How to read a row of this source. null: as data.format says."""
    columns: Columns | None = None
    """What the columns of this source mean, in place of data.columns. null: those of data.columns that it has."""
    train_on: TrainOn | None = None
    """Which tokens of this source are trained. null: as data.train_on says."""
    system: str | None = None
    """System prompt for the conversations of this source that have none; "" for none. null: that of data.system."""

    @property
    def own(self) -> dict[str, Any]:
        """What it says for itself, in place of the recipe's settings of these names."""
        return {key: value for key in OWN if (value := getattr(self, key)) is not None}


def _as_sources(value: Any) -> Any:
    """A path, a source or a list of either, as a list of sources."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | dict | SourceRecipe) for each in values):
        raise PydanticCustomError("sources", "a path, a source such as {hub: owner/name}, or a list of these")
    return [{"path": each} if isinstance(each, str) else each for each in values]


def _as_written(sources: list[SourceRecipe]) -> Any:
    """The shortest way to write sources: a plain path where a path is all there is."""
    values = [source.model_dump(exclude_defaults=True) for source in sources]
    written = [each["path"] if [*each] == ["path"] else each for each in values]
    return written[0] if len(written) == 1 else written


AnySources = str | SourceRecipe | list[str | SourceRecipe]
Sources = Annotated[
    list[SourceRecipe],
    Field(min_length=1),
    BeforeValidator(_as_sources, json_schema_input_type=AnySources),
    PlainSerializer(_as_written),
]
Fraction = Annotated[Number, Field(gt=0, lt=1)]


def _fraction_or_sources(value: Any) -> Any:
    value = _number_from_text(value)
    return value if value is None or isinstance(value, int | float) else _as_sources(value)


TEMPLATES = ("chatml", "llama-3", "mistral", "gemma", "alpaca", "plain")
Allowed = Literal[
    "too_long", "overlap", "no_stop_token", "two_forms", "double_bos", "special_in_text", "not_round_trip"
]

# fmt: off
Droppable = Literal[
    "malformed", "empty", "no_target", "duplicate", "overlap", "special_in_text", "double_bos", "not_round_trip",
    "no_stop_token", "not_prompted", "two_forms", "empty_question", "placeholder", "entities", "empty_thoughts",
]
# fmt: on


class DataRecipe(Section):
    train: Sources
    """Training data: a file, a folder, a glob, `{hub: owner/name, split: train}`, or a list of these, each with a
    `weight`, `format`, `columns`, `train_on` or `system` of its own if wanted."""
    validation: Annotated[
        Fraction | Sources | None,
        BeforeValidator(_fraction_or_sources, json_schema_input_type=float | AnySources | None),
    ] = None
    """Validation data: a fraction of the training rows to hold out (chosen by the seed; equal rows stay together), or
    sources as in `train`."""
    group_by: str | None = Field(None, min_length=1)
    """With a fraction: column whose equal values are held out together, such as a conversation's id."""
    format: Format = "auto"
    """How to read a row: `text`; `completion` (prompt, completion); `instruction` (instruction, input, output); `chat`
    (messages or conversations); auto goes by the columns."""
    columns: Columns = Field(
        {},
        description="Where the columns have other names: field → your column, such as {prompt: Question}; null as "
        "the column: do not use it. Fields: "
        + ", ".join(FIELDS)
        + ". question and answer, user and assistant, input and output mean prompt and completion; with format: "
        "instruction or another field of it, they mean instruction and output.",
    )
    template: str | None = Field(None, min_length=1)
    """Chat template: a .jinja file, or a built-in one for base models that have none (chatml, llama-3, mistral, gemma,
    alpaca, plain). null: the model's own."""
    template_arguments: dict[str, bool | int | float | str] = {}
    """What the chat template is given beside the conversation, such as {enable_thinking: false} or {reasoning_effort:
    low}. It is written into the template that is kept with the adapter."""
    train_on: TrainOn | None = None
    """Which tokens are trained: all assistant turns, the last one, the completion, or everything. null: answers
    (assistant turns, completions), or the whole text."""
    system: str | None = Field(None, min_length=1)
    """System prompt, put through the chat template before every conversation that has none. It is kept with the
    adapter, so that `lora generate` and `lora chat` begin with it."""
    max_seq_len: int = Field(1024, ge=2, le=_MOST)
    """Longest example in tokens, and the length of a packed sequence."""
    packing: bool = True
    """Pack several examples into one sequence, each seeing only itself. Off: examples of similar length in a
    micro-batch."""
    too_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to an example above max_seq_len: `error` leaves them out up to 1 % of the rows and stops above;
    `split` is for text only."""
    allow: list[Allowed] = []
    """Problems of the data that do not stop the run."""
    drop: list[Droppable] = []
    """Problems of the data whose rows are left out, and counted, before any are held out; of rows that repeat an
    earlier row all but the first, of `overlap` the validation rows."""
    streaming: bool = False
    """Read rows as training needs them, and keep none: for data larger than the disk. Needs max_steps."""
    general_text: str | None = Field(None, min_length=1)
    """Text file whose loss is measured with and without the adapter at the end, to see what was forgotten. null:
    English prose that comes with the program."""
    cache: str | None = Field(None, min_length=1)
    """Folder for prepared tokens that several runs share. null: in the run folder."""

    @property
    def held_out(self) -> list[SourceRecipe]:
        """The sources of the validation data; none where a fraction of the training rows is held out."""
        return self.validation if isinstance(self.validation, list) else []

    def of(self, source: SourceRecipe) -> DataRecipe:
        """These settings as they are for one source."""
        own = source.own
        return self.model_copy(update={**own, "system": own.get("system", self.system) or None})

    @model_validator(mode="after")
    def _canonical_columns(self) -> DataRecipe:
        for each in (self, *self.train, *self.held_out):
            if each.columns:
                object.__setattr__(each, "columns", _canonical(each.columns, each.format or self.format))
        return self


Mode = Literal["none", "selective", "full", "offload"]


def _as_mode(value: Any) -> Any:
    """`gradient_checkpointing: true`, as most tools call it, is `full`."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class TrainRecipe(Section):
    epochs: Number = Field(1.0, gt=0, le=1e6)
    """Passes over the training data; a fraction is allowed."""
    max_steps: int | None = Field(None, ge=1, le=_MOST)
    """Stop after this many steps even if epochs remain."""
    micro_batch_size: Annotated[int, Field(ge=1, le=_MOST)] | Literal["auto"] = 4
    """Sequences per forward pass: examples, or packed sequences of max_seq_len; `auto`: as many of batch_size as fit
    into memory. What does not fit is halved; the result does not depend on it."""
    batch_size: int | None = Field(None, ge=1, le=_MOST)
    """With micro_batch_size: auto: sequences per optimizer step."""
    tokens_per_micro_batch: int | None = Field(None, ge=2, le=_MOST)
    """Instead of micro_batch_size: as many sequences per forward pass as fit into this many tokens."""
    gradient_accumulation_steps: int = Field(4, ge=1, le=_MOST)
    """Micro-batches per optimizer step, over all processes."""
    learning_rate: Number = Field(2e-4, gt=0)
    """Peak learning rate; 2e-4 is what QLoRA used up to 13B (Dettmers et al. 2023, table 9)."""
    lora_plus_ratio: Number = Field(1.0, ge=1)
    """LoRA+: B's learning rate is this many times A's, which is learning_rate; the paper has 16 (Hayou et al. 2024)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; with schedule_free_adamw it is always constant."""
    warmup_ratio: Number = Field(0.03, ge=0, lt=1)
    """Share of all steps during which the rate rises from 0; 0.03 is what the QLoRA scripts use."""
    min_learning_rate_ratio: Number = Field(0.0, ge=0, le=1)
    """Where cosine and linear end, as a share of the peak rate."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "schedule_free_adamw"] = "adamw"
    """AdamW of torch; or of bitsandbytes with 8-bit states, or with states that page to host memory; or schedule-free,
    which averages the weights instead of lowering the rate (Defazio et al. 2024)."""
    weight_decay: Number = Field(0.0, ge=0)
    """Decoupled weight decay of A and B."""
    beta1: Number = Field(0.9, ge=0, lt=1)
    """Adam's decay of the mean of gradients."""
    beta2: Number = Field(0.999, ge=0, lt=1)
    """Adam's decay of the mean of squared gradients."""
    max_grad_norm: Number = Field(0.3, gt=0)
    """Gradients are scaled down to this L2 norm (0.3: Dettmers et al. 2023, appendix B)."""
    z_loss: Number = Field(0.0, ge=0)
    """Adds this times log² Z of each target token to what is minimized, so that logits do not drift; PaLM used 1e-4
    (Chowdhery et al. 2022, section 5). The loss that is shown is without it."""
    gradient_checkpointing: Annotated[Mode, BeforeValidator(_as_mode, json_schema_input_type=Mode | bool)] = "none"
    """Recompute activations in the backward pass: less memory, up to a third more time, same result. `full` (or true):
    of all blocks; `selective`: of as few as activation_memory allows; `offload`: full, with the blocks' inputs in host
    memory, for rows so long that these would fill the GPU."""
    activation_memory: Number | None = Field(None, gt=0)
    """With gradient_checkpointing: selective: GiB that activations may keep. null: 80 % of what model
    and optimizer leave free."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile: minutes at the start, faster steps after."""
    liger_kernel: bool = False
    """On a GPU, instead of compile: Liger's fused kernels (`pip install liger-kernel`) for norms, gated MLPs and rotary
    embeddings, where a trial on the model finds them equal. Not measured yet."""
    shard_base: bool = False
    """Several processes: each holds only its share of the frozen weights (FSDP2), for a base too large for one card.
    Slower, same result."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initial A, the order of rows, the hold-out and dropout."""
    eval_every: int | None = Field(None, ge=1, le=_MOST)
    """Steps between evaluations on the validation data. null: only before and after training."""
    patience: int | None = Field(None, ge=1, le=_MOST)
    """Evaluations of eval_every in a row without a lower loss, after which training ends; the best adapter is kept. The
    learning rate stays that of the whole run. null: never."""
    sample_every: int | None = Field(None, ge=1, le=_MOST)
    """Steps between samples: what base and adapter answer to some prompts, greedily and in at most 128 tokens, before
    step 1, during the run and at its end. null: none."""
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | Annotated[str, Field(min_length=1)] = 3
    """With sample_every: how many validation rows to take the prompts from, or a file of prompts: rows with `prompt` or
    `messages`, or a .txt with one a line."""
    checkpoint_every: int | None = Field(None, ge=1, le=_MOST)
    """Steps between resumable checkpoints. null: those of checkpoint_minutes, at the end, and when interrupted."""
    checkpoint_minutes: Number | None = Field(15.0, gt=0)
    """Minutes after which a checkpoint is written that is for resuming alone; the newest of them is kept, beside the
    others. null: never by the clock."""
    keep_checkpoints: int = Field(2, ge=1, le=_MOST)
    """How many of the newest checkpoints to keep, beside that of the best step."""
    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    """When the loss or gradient of a step is NaN or infinite, or the loss is above twice that of guessing: stop; skip
    its update; or rewind to the last checkpoint and go on with the data after the step."""
    on_write_error: Literal["stop", "pause"] = "stop"
    """When a checkpoint, adapter or metric cannot be written, such as on a full disk: stop, with the last checkpoint
    intact; or wait, and try again until it works."""


class Recipe(Section):
    """One run of `lora train`."""

    base_model: str = Field(min_length=1)
    """Hub id, a local folder with config.json and safetensors weights, or a GGUF file (with quantization: gguf or int4
    its blocks are kept; with none its numbers)."""
    revision: str | None = None
    """Hub branch, tag or commit of the base model. null: main."""
    tokenizer: str | None = Field(None, min_length=1)
    """With a GGUF file as base_model: folder of the original model, whose tokenizer is used. null: the file's."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    quantization: Quantization = DEFAULT
    """How the frozen base is held: 4-bit NF4 (Dettmers et al. 2023, section 3), 8-bit, int4 (4-bit in groups with a
    scale and an offset, as GGUF's Q4_1), gguf (the blocks of a GGUF file, in Q8_0, Q4_1 and Q4_0), or as it is."""
    group_size: Literal[32, 64, 128] = 32
    """int4 only: weights that share a scale and an offset, which take 32 bits: 5, 4.5 or 4.25 bits a weight."""
    double_quantization: bool = True
    """NF4 only: quantize the scales as well, 0.37 bits a weight less (Dettmers et al. 2023, section 3)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute dtype, and storage of what is not quantized; auto: bf16 where the device has it."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """Where to train; auto: what accelerate finds."""
    adapter: AdapterRecipe = Field(default_factory=lambda: AdapterRecipe.model_validate({}))
    """The LoRA adapter."""
    data: DataRecipe
    """Training and validation data."""
    train: TrainRecipe = Field(default_factory=lambda: TrainRecipe.model_validate({}))
    """The training run."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Experiment trackers to report to, beside metrics.jsonl."""
    output: str = Field(min_length=1)
    """The run folder; it must not hold another run."""
