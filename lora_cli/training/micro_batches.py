"""How a step is split into micro-batches, the gradients of each, and what happens when one does not fit into memory."""

from __future__ import annotations

import gc
import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.trained import cast_once, dropout_keys
from lora_cli.base.device import free_memory_bytes
from lora_cli.data.batches import MicroBatch
from lora_cli.data.example import Example
from lora_cli.data.feed import Feed
from lora_cli.errors import LoraError, reason_of, refuse_if
from lora_cli.evaluation.loss import training_loss
from lora_cli.files import human_bytes
from lora_cli.training.processes import any_process, sum_over_processes
from lora_cli.training.session import Session

# Said by torch, CUDA, cuBLAS, Triton and the C++ library, in plain RuntimeErrors, when memory runs out.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
_HARDLY_LARGER = 1.1  # than what step 1 contains anyway
_AMPLE = 4  # times what is kept until the backward pass: kernels and fragments come on top


class DoesNotFit(Exception):
    """A micro-batch did not fit into the memory of some process."""


@dataclass(frozen=True)
class StepData:
    """What a step trains on. position: of the feed behind it. made: micro-batches on the host, by their place among the
    pieces of the step, as `made_for`, (training step, splits), asks for them.
    """

    batches: list[list[Example]]
    position: dict[str, int]
    made_for: tuple[int, int]
    made: dict[int, MicroBatch]


class MicroBatches:
    """Runs the micro-batches of a step, on all processes, and adds up their gradients.

    `splits`: how many pieces each micro-batch of the recipe is cut into. The loss is a sum over the step and dropout is
    a function of the token, so this changes nothing in the result.
    """

    def __init__(
        self,
        session: Session,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter],
        scaler: torch.amp.GradScaler,
    ):
        self.session, self.accelerator, self.parameters, self.scaler = session, accelerator, parameters, scaler
        self.recipe = session.recipe.train

    def make_ahead(self, feed: Feed, number: int, step: int, splits: int) -> StepData:
        """Step `number` of the data, with the micro-batches that this process makes of it in training step `step`.

        For a thread beside the one that computes. What has no room on the host is left out: `run` collates it then.
        """
        batches = feed.step(number)
        pieces, made = cut(batches, max(splits, self._fewest_splits(len(batches)))), {}
        try:
            for at in range(self.accelerator.process_index, len(pieces), self.accelerator.num_processes):
                batch = self._collate(pieces[at], step, torch.device("cpu"))
                made[at] = batch.pinned() if self.session.device.type == "cuda" else batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return StepData(batches, feed.position(), (step, splits), made)

    def run(
        self,
        step: int,
        batches: Sequence[Sequence[Example]],
        weight: float,
        splits: int,
        finish: Callable[[], Tensor] | None = None,
        made: Mapping[int, MicroBatch] | None = None,
    ) -> tuple[float, float]:
        """Leaves the gradient of the training loss, divided by `weight`; with fp16 it is scaled by the scaler.

        finish: what is done with the gradients of the whole step; gives a number, such as their norm. made: of
        `StepData`, for these splits. Returns the cross-entropy summed over the step, and the number, 0 without
        `finish`. One process reads both from the device at once, and nothing before: no micro-batch makes it wait.

        Raises DoesNotFit, on all processes alike, with no gradient left. With a sharded base it raises LoraError
        instead of DoesNotFit: while one process splits its micro-batch, the others would wait for its shares.
        """
        pieces = cut(batches, max(splits, self._fewest_splits(len(batches))))
        losses: list[Tensor] = []
        total, number, failed, at = 0.0, 0.0, "", 0
        several = self.accelerator.num_processes > 1
        if not self.session.model.training:
            self.session.model.train()
        try:
            with cast_once(self.session.layers, self.session.dtype):
                for at in range(self.accelerator.process_index, self._passes(pieces), self.accelerator.num_processes):
                    if at < len(pieces):
                        losses.append(self._forward_backward(pieces[at], step, at, weight, (made or {}).get(at)))
                    else:
                        self._dummy_pass(pieces[-1], step, at, weight)
            # An allocation on the device may fail as late as this.
            total, number = _read(losses, None if several else finish)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = reason_of(error)
            if self.recipe.shard_base:
                raise self._too_large_to_share(pieces[min(at, len(pieces) - 1)], failed) from error
        failures = float(bool(failed))
        if several:
            here = torch.tensor([total, failures], dtype=torch.float64)
            total, failures = sum_over_processes(self.accelerator, here).tolist()
        if failures:
            self._forget_gradients()
            raise DoesNotFit(failed or "in another process")
        if several:
            self._add_gradients()
            _, number = _read([], finish)
        return total, number

    def smaller(self, batches: Sequence[Sequence[Example]], splits: int, problem: DoesNotFit) -> int:
        """Splits with which the largest piece has about half as many tokens.

        Raises LoraError for a single example, and with a sharded base.
        """
        largest = cut(batches, max(splits, self._fewest_splits(len(batches))))[0]
        if self.recipe.shard_base:
            raise self._too_large_to_share(largest, str(problem))
        what = f"a single example of {len(largest[0].ids):,} tokens does not fit into memory ({problem})"
        fix = f"use {self._more_recomputing(', ')}a smaller data.max_seq_len, or quantization: nf4"
        refuse_if(len(largest) == 1, what, where=largest[0].source, fix=fix)
        while len(cut(batches, splits)[0]) >= len(largest):
            splits *= 2
        return splits

    def try_largest(self, first: int, splits: int, say: Callable[[str], None]) -> int:
        """Try the largest micro-batch of this run before the first step, so that it fails now rather than hours later.

        Returns the splits to begin with: with micro_batch_size: auto the fewest that fit, else `splits`, or more if
        those do not fit. Skips the trial if step `first` has one of about that size, or a CPU has plenty of memory.
        """
        largest = [self.session.feed.largest()]
        auto = self.recipe.micro_batch_size == "auto"
        if not auto and first == 1 and not self.session.recipe.data.streaming:
            begins = cut(self.session.feed.step(first), splits)[0]
            if _tokens(cut(largest, splits)[0]) <= _HARDLY_LARGER * _tokens(begins):
                return splits
        if not auto and self._is_ample(_tokens(cut(largest, splits)[0])):
            return splits
        fitting = self._fewest_that_fit(largest, splits, auto, say)
        if auto:
            tokens = _tokens(cut(largest, fitting)[0])
            say(f"micro-batches of up to {tokens:,} tokens fit: a step is cut into up to {fitting}")
        return fitting

    def _is_ample(self, tokens: int) -> bool:
        """Whether every process is on a CPU with ample memory: there a trial, as expensive as a step, is skipped."""
        needed, free = self._needed_and_free(tokens)
        short = self.session.device.type != "cpu" or _AMPLE * needed >= free
        return not any_process(self.accelerator, short)

    def _needed_and_free(self, tokens: int) -> tuple[int, int]:
        """(bytes that the activations of so many tokens keep, bytes that are free)."""
        plan, device = self.session.activations, self.session.device
        kept = plan.kept_bytes(tokens) + (plan.host_bytes(tokens) if device.type == "cpu" else 0)
        return kept, free_memory_bytes(device)

    def _fewest_that_fit(
        self, largest: list[list[Example]], splits: int, auto: bool, say: Callable[[str], None]
    ) -> int:
        too_few = 0
        while (problem := self._trial(largest, splits)) is not None:
            too_few = splits
            splits = self.smaller(largest, splits, problem)
            if not auto:
                say(smaller_line(problem, splits))
        if auto:
            fewer = range(too_few + 1, splits)
            splits = too_few + 1 + bisect_left(fewer, True, key=lambda each: self._trial(largest, each) is None)
        return splits

    def _trial(self, largest: list[list[Example]], splits: int) -> DoesNotFit | None:
        """Forward and backward of the largest piece, whose gradients are dropped; None if it fits."""
        piece = cut(largest, splits)[0]
        needed, free = self._needed_and_free(_tokens(piece))
        on_cpu = self.session.device.type == "cpu"
        if any_process(self.accelerator, on_cpu and needed > free):  # there the system kills instead of refusing
            return DoesNotFit(f"{human_bytes(needed)} of activations, {human_bytes(free)} free")
        try:
            self.run(1, [piece] * self.accelerator.num_processes, 1.0, 1)
        except DoesNotFit as problem:
            return problem
        self._forget_gradients()
        return None

    def _collate(self, piece: list[Example], step: int, device: torch.device) -> MicroBatch:
        dropout = (self.recipe.seed, step) if self.session.recipe.adapter.dropout else None
        return self.session.collate(piece, dropout=dropout, device=device)

    def _forward_backward(
        self, piece: list[Example], step: int, at: int, weight: float, made: MicroBatch | None = None
    ) -> Tensor:
        """Cross-entropy of a micro-batch, a scalar on the device; its gradient is added to the parameters'."""
        recipe, session = self.recipe, self.session
        batch = self._collate(piece, step, session.device) if made is None else made.to(session.device)
        _seed(recipe.seed, step, at, session.device)
        with dropout_keys(session.layers, batch.dropout_keys):  # also for what the backward pass recomputes
            loss, cross_entropy = training_loss(session.model, batch, z_loss=recipe.z_loss)
            self.scaler.scale(loss / weight).backward()
        return cross_entropy

    def _passes(self, pieces: Sequence[list[Example]]) -> int:
        """Passes of all processes together. With a sharded base each makes the same number: a pass needs them all."""
        processes = self.accelerator.num_processes
        return -(-len(pieces) // processes) * processes if self.recipe.shard_base else len(pieces)

    def _dummy_pass(self, piece: list[Example], step: int, at: int, weight: float) -> None:
        """A pass whose loss and gradients are dropped: the other processes need this one's shares of the base."""
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self._forward_backward(piece[:1], step, at, weight)
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            parameter.grad = gradient

    def _too_large_to_share(self, piece: list[Example], problem: str) -> LoraError:
        return LoraError(
            f"a micro-batch of {_tokens(piece):,} tokens does not fit into memory ({problem}), and with "
            "train.shard_base it cannot be cut smaller during training",
            fix=f"write {self._more_recomputing(', or ')}a smaller train.micro_batch_size and as much larger a "
            "train.gradient_accumulation_steps, with the same result",
        )

    def _more_recomputing(self, end: str) -> str:
        """What of gradient checkpointing the recipe does not use yet, and `end`; on a CPU nothing can be offloaded."""
        best = "full" if self.session.device.type == "cpu" else "offload"
        used = self.recipe.gradient_checkpointing in (best, "offload")
        return "" if used else f"train.gradient_checkpointing: {best}{end}"

    def _fewest_splits(self, batches: int) -> int:
        """Enough for every process to get one: micro_batch_size: auto makes one micro-batch of a step."""
        return -(-self.accelerator.num_processes // batches) if self.recipe.batch_size is not None else 1

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        if self.session.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add_gradients(self) -> None:
        """Sum the adapter's gradients over processes, all that they exchange in a step.

        In one call: an adapter is hundreds of small tensors, and each call waits for the slowest process.
        """
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        summed = sum_over_processes(self.accelerator, torch.cat([each.flatten() for each in gradients]))
        for parameter, part in zip(self.parameters, summed.split([each.numel() for each in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def _read(losses: Sequence[Tensor], finish: Callable[[], Tensor] | None) -> tuple[float, float]:
    """(sum of the losses, what `finish` gives), all in one read from the device."""
    numbers = [*losses, finish()] if finish is not None else losses
    read = torch.stack([*numbers]).tolist() if numbers else []
    last = read.pop() if finish is not None else 0.0
    return sum(read, 0.0), last


def smaller_line(problem: DoesNotFit, splits: int) -> str:
    return f"out of memory ({problem}): each micro-batch is now cut into {splits}; the result stays the same"


def cut(batches: Sequence[Sequence[Example]], splits: int) -> list[list[Example]]:
    """Each micro-batch in up to `splits` pieces of about equal numbers of tokens; the largest of all comes first.

    Largest first: what does not fit fails at once, and the memory that the others need is allocated.
    """
    pieces = [piece for batch in batches for piece in _in_splits(batch, splits)]
    return sorted(pieces, key=lambda piece: -_tokens(piece))


def _in_splits(examples: Sequence[Example], splits: int) -> list[list[Example]]:
    """Neighbours stay together: each example goes to the piece that its middle token falls into."""
    total = _tokens(examples)
    pieces: dict[int, list[Example]] = {}  # only those with examples: there may be more splits than examples
    before = 0
    for example in examples:
        at = min(splits - 1, int((before + len(example.ids) / 2) * splits / total))
        pieces.setdefault(at, []).append(example)
        before += len(example.ids)
    return list(pieces.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on a CPU under a limit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


def _seed(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Make what a model's own code draws a function of seed, step and micro-batch, so resuming repeats it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(number)  # torch.manual_seed keeps a stack trace for absent devices
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
