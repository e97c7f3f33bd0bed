"""`lora generate --adapters FILE`: a prompt in each row, answered by its own adapter, several rows in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from lora_cli.adapters.file import AdapterFile, require_same_base
from lora_cli.adapters.named import Named, read_named
from lora_cli.adapters.opened import Opened, base_of, open_base, other_base
from lora_cli.adapters.several import Several
from lora_cli.base.load import load_tokenizer, model_config
from lora_cli.base.source import find_base
from lora_cli.base.text import positions
from lora_cli.base.trials import ordinary_tokens
from lora_cli.data.files.readers import Row, read_file
from lora_cli.errors import LoraError, RecipeErrors, home_expanded, refuse_if
from lora_cli.evaluation.generate import Prompting
from lora_cli.evaluation.generation import Completion, Sampling, complete, generation_config, within_positions
from lora_cli.evaluation.samples import turns_of
from lora_cli.foreign import reason
from lora_cli.streams import print_json, print_note, print_piece, print_result

_MIX = 'write "adapter": {"runs/one": 0.7, "runs/two": 0.3}, or null for the base alone'


class _Asked(BaseModel):
    """A row of the file; what is None goes by the command line."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str | None = None
    messages: Any = None
    adapter: str | dict[str, float] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @property
    def mix(self) -> dict[str, float]:
        """The weights of the row's adapters."""
        return {self.adapter: 1.0} if isinstance(self.adapter, str) else self.adapter or {}


@dataclass(frozen=True)
class _Request:
    """A row that can be answered. adapter: as the row names it; None: the base. turns: the system turn included."""

    adapter: str | dict[str, float] | None
    mix: dict[str, float]
    sampling: Sampling
    prompting: Prompting
    turns: list[dict[str, Any]]
    ids: list[int]

    def as_dict(self, answer: Completion) -> dict[str, Any]:
        first = self.turns[0]
        return {
            "prompt": self.turns[-1]["content"],
            "adapter": self.adapter,
            "completion": answer.text,
            "prompting": "template" if self.prompting.template else "raw",
            "stop": answer.stop,
            "new_tokens": answer.tokens,
            "system": first["content"] if first["role"] == "system" else None,
        }


def answer_file(
    file: str,
    base: str | None,
    *,
    system: str | None,
    through_template: bool | None,
    batch_size: int,
    as_json: bool,
    seed: int,
    sampling: dict[str, Any],
    trust_remote_code: bool,
    **opening: Any,
) -> None:
    """Print a completion of each row, in the file's order. base: nothing means the one that all adapters name.

    seed, sampling: for rows that do not say. opening: further arguments of `open_base`. Raises LoraError with every row
    that cannot be answered, before a model is loaded.
    """
    rows = list(read_file(Path(home_expanded(file))))
    adapters: dict[str, tuple[Named, AdapterFile]] = {}  # each read once

    def asked(row: Row) -> tuple[Row, _Asked, Sampling]:
        found = _asked(row)
        for each in found.mix:
            if each not in adapters:
                adapters[each] = read_named(each, base)
        return row, found, _sampling(found, Sampling(**sampling, seed=seed))

    looked_at = _of_each(file, rows, asked)
    stored = {each: own for each, (_, own) in adapters.items()}
    name, revision = (base, None) if base is not None else base_of([*stored.values()])
    source = find_base(name, revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = model_config(source, trust_remote_code)
    prompted: dict[tuple[str, ...], Prompting] = {}
    said: set[str] = set()

    def say(note: str) -> None:
        if note not in said:
            said.add(note)
            print_note(note)

    def request(looked_at: tuple[Row, _Asked, Sampling]) -> _Request:
        row, found, own = looked_at
        parts = [adapters[each] for each in found.mix]
        for _, own_file in parts:
            require_same_base(own_file, source)
        if tuple(found.mix) not in prompted:
            make: Any = partial(Prompting, tokenizer, through_template=through_template, default="raw")
            ways = [make(*part, source.folder, say=lambda _: None).way for part in parts]
            if differ := any(each != ways[0] for each in ways):
                say("note: a row's adapters were not all prompted in one way in training: it is prompted as the base")
            one = (Named(name), None) if differ or not parts else parts[0]
            prompted[tuple(found.mix)] = make(*one, source.folder, say=say)
        prompting = prompted[tuple(found.mix)]
        turns, answer = turns_of(row, prompting.template)
        refuse_if(answer is not None, "the last turn is an answer already", fix="end messages with the user's turn")
        if turns[0]["role"] != "system":
            turns = [*prompting.opening(system), *turns]
        ids = prompting.ids(turns, row.where)
        within_positions(len(ids), 1, config)
        return _Request(found.adapter, found.mix, own, prompting, turns, ids)

    requests = _of_each(file, looked_at, request)
    opened = open_base(base, [*stored.values()], trust_remote_code=trust_remote_code, **opening)
    several = Several(opened.model, opened.source)
    several.add(stored)
    for note in [*opened.notes, *(note for each in stored.values() for note in other_base(each, base))]:
        say(f"note: {note}")
    _print(requests, _answers(opened, several, requests, batch_size, say), as_json=as_json)


def _of_each(file: str, rows: Sequence[Any], call: Callable[[Any], Any]) -> list[Any]:
    """Of each row, or of each tuple that begins with one. Raises LoraError with the problems of all."""
    found, problems = [], []
    for each in rows:
        try:
            found.append(call(each))
        except LoraError as error:
            where = (each if isinstance(each, Row) else each[0]).where
            where = f"{where}: {error.where}" if error.where and error.where != where else where
            problems.append(LoraError(error.what, where=where, fix=error.fix, details=error.details))
    if problems:
        raise problems[0] if len(problems) == 1 else RecipeErrors(problems, file)
    return found


def _asked(row: Row) -> _Asked:
    try:
        found = _Asked.model_validate(row.values)
    except ValidationError as error:
        fix = f"a row may have {', '.join(_Asked.model_fields)}"
        fix = _MIX if {each["loc"][0] for each in error.errors()} == {"adapter"} else fix
        raise LoraError(f"the row is not a request: {reason(error)}", fix=fix) from None
    if (found.prompt is None) == (found.messages is None):
        both = "both prompt and messages" if found.messages is not None else "neither prompt nor messages"
        raise LoraError(f"the row has {both}", fix='write {"prompt": "…", "adapter": "runs/my-run"}')
    if found.adapter == {} or 0 in found.mix.values():
        what = "the weight of an adapter is 0" if found.mix else "adapter is empty"
        raise LoraError(what, fix=_MIX)
    return found


def _sampling(asked: _Asked, common: Sampling) -> Sampling:
    """The row's own settings in the place of those of all. Raises LoraError for what greedy decoding would ignore."""
    own = {name: value for name in vars(common) if (value := getattr(asked, name)) is not None}
    found = replace(common, **own)
    if not found.temperature and (asked.top_p is not None or asked.top_k is not None or asked.seed is not None):
        what = "top_p, top_k and seed are for sampling, but temperature is 0, which is greedy"
        raise LoraError(what, fix="add temperature to the row, or --temperature for all")
    return found


def _answers(
    opened: Opened, several: Several, requests: Sequence[_Request], batch_size: int, say: Callable[[str], None]
) -> list[Completion]:
    """In the order of the requests."""
    if batch_size > 1 and len(requests) > 1 and not _rows_stay_apart(opened.model, several):
        say("note: rows of a batch change each other in this model, so they are answered one by one")
        batch_size = 1
    found: dict[int, Completion] = {}
    for batch in _batches(requests, batch_size, positions(opened.model.config)):
        chosen = [requests[at] for at in batch]
        several.use([each.mix for each in chosen])
        stop = chosen[0].prompting.stop
        config = generation_config(opened.model, opened.tokenizer, max_new_tokens=1, stop=stop)
        each_row = [each.sampling for each in chosen]
        answers = complete(opened.model, opened.tokenizer, [each.ids for each in chosen], config, each_row=each_row)
        found |= zip(batch, answers, strict=True)
    return [found[at] for at in range(len(requests))]


def _batches(requests: Sequence[_Request], size: int, seen: int | None) -> Iterator[list[int]]:
    """Rows of one adapter beside each other, for they are one part of its layers; in a batch all end with one token.

    seen: the model's positions; rows that are longer than these together with their padding are in several batches.
    """
    adapters = list(dict.fromkeys(tuple(each.mix) for each in requests))

    def key(at: int) -> tuple[int, int, int]:
        each = requests[at]
        stop = each.prompting.stop
        return -1 if stop is None else stop, adapters.index(tuple(each.mix)), len(each.ids)

    def room(batch: Sequence[int]) -> int:
        return max(len(requests[at].ids) for at in batch) + max(requests[at].sampling.max_new_tokens for at in batch)

    batch: list[int] = []
    for at in sorted(range(len(requests)), key=key):
        apart = batch and key(at)[0] != key(batch[0])[0]
        if len(batch) == size or apart or (batch and seen and room([*batch, at]) > seen):
            yield batch
            batch = []
        batch.append(at)
    yield batch


@torch.inference_mode()
def _rows_stay_apart(model: Any, several: Several) -> bool:
    """Whether a padded row with an adapter of its own is computed as it is alone: tried on two short rows."""
    ids = ordinary_tokens(model, 16, 0).to(model.device).view(2, 8)
    masks = torch.ones_like(ids)
    masks[1, :3] = 0
    first = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0, output_logits=True)
    first.return_dict_in_generate = True
    mixes = [{name: 1.0} for name in several.names[:2]]
    mixes = [*mixes, {}, {}][:2]

    def logits(rows: slice, start: int) -> torch.Tensor:
        several.use(mixes[rows])
        made = model.generate(input_ids=ids[rows, start:], attention_mask=masks[rows, start:], generation_config=first)
        return made.logits[0].float()

    try:
        together = logits(slice(2), 0)
    except LoraError:  # a layer that sees only some of the tokens
        return False
    alone = torch.cat([logits(slice(1), 0), logits(slice(1, 2), 3)])
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((together - alone).abs().max() <= limit * alone.std())


def _print(requests: Sequence[_Request], answers: Sequence[Completion], *, as_json: bool) -> None:
    if as_json:
        print_json([each.as_dict(answer) for each, answer in zip(requests, answers, strict=True)])
    else:
        for number, (each, answer) in enumerate(zip(requests, answers, strict=True), 1):
            named = " ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in each.mix.items())
            print_result(f"row {number}, {named or 'the base alone'}:")
            print_piece(f"{answer.text}\n\n")
    empty = [number for number, answer in enumerate(answers, 1) if not answer.text.strip()]
    cut = [number for number, answer in enumerate(answers, 1) if answer.text.strip() and answer.stop is None]
    for what, found in (("empty", empty), ("cut at max_new_tokens or at the end of what the model sees", cut)):
        if found:
            print_note(f"note: {len(found)} of {len(answers)} completions are {what}: rows {_named(found)}")


def _named(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" …" if len(numbers) > 10 else "")
