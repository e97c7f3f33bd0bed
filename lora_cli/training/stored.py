"""What a run wrote of itself, as it is read back: each file has a schema, because the folder may be a stranger's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lora_cli.foreign import LARGEST

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Text = Annotated[str, Field(max_length=10_000)]
Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+:?-]{1,255}$")]  # of a machine's name or a time
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Names = Annotated[list[Text], Field(max_length=100_000)]


class Stored(BaseModel):
    """Values as JSON has them: no text in place of a number, no NaN. Keys that nobody reads are dropped."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class Status(Stored):
    """status.json, which `lora runs` shows: what is taken over from it when a run goes on."""

    started: Text | None = None
    wall_seconds: Seconds | None = None


class Holder(Stored):
    """.lock: which process writes to the folder, and since when."""

    model_config = ConfigDict(extra="forbid")

    pid: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    host: Plain = "?"
    since: Plain = "?"


class Changed(Stored):
    """What --allow let change, and after which step."""

    after_step: Count
    changes: Names


class Environment(Stored):
    """environment.json: what a run was begun with. Beside these, a version for each package by its name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Text | Count | None] = Field(init=False)

    lora: Text | None = None
    device: Text | None = None
    dtype: Text | None = None
    processes: Count | None = None
    base_revision: Text | None = None
    base_fingerprint: Text | None = None
    data_fingerprint: Text | None = None
    data_files: dict[Text, Text] = {}
    changed: Annotated[list[Changed], Field(max_length=100_000)] = []


class Line(Stored):
    """A line of metrics.jsonl, and whatever else is measured of a step."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Text | float | int | None] = Field(init=False)

    step: Annotated[int, Field(ge=1, le=LARGEST)]
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    target_tokens: Count
    tokens: Count
    seconds: Seconds
    tokens_per_second: float
    peak_memory_bytes: Count
    validation_loss: float | None = None
    skipped: Text | None = None

    def values(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class Sample(Stored):
    """A line of samples.jsonl: what was answered to a prompt. step: 0 of the base alone, else of the adapter.

    stop: the token that ended the answer, None where it was cut. error: why there is no answer.
    """

    step: Count
    number: Count
    prompt: Text
    wanted: Text | None = None
    text: Text | None = None
    stop: Text | None = None
    new_tokens: Count
    error: Text | None = None

    @property
    def words(self) -> str:
        """The answer for a person, with a mark where it was cut."""
        if self.text is None:
            return f"(none: {self.error})"
        return f"{self.text} …" if self.stop is None else self.text


class Manifest(Stored):
    """manifest.json of a checkpoint: what its other files are, beside what run and versions it belongs to."""

    format: int
    checksum: Text
    files: dict[Text, dict[str, Any]] = {}


class NumpyRandom(Stored):
    bit_generator: Text
    has_gauss: Annotated[int, Field(ge=0, le=1)]
    gauss: float
    pos: Annotated[int, Field(ge=0, le=624)]


class Random(Stored):
    """Random states, but for the tensors in state.safetensors. python: its version, and the normal number kept back."""

    python: tuple[int, float | None]
    numpy: NumpyRandom
