"""How a step is cut into micro-batches, the gradients of each, and what is done when one does not fit into memory."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.trained import cast_once, dropout_keys
from lora_cli.base.device import free_memory_bytes
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import training_loss
from lora_cli.files import human_bytes
from lora_cli.training.processes import agree, lost_process_is_told, sum_over_processes
from lora_cli.training.session import Session

# By what torch, CUDA, cuBLAS, Triton and the C++ library say, in plain RuntimeErrors, where no memory is left.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
_HARDLY_LARGER = 1.1  # than what step 1 brings anyway
_AMPLE = 4  # times what is kept until the backward pass: kernels and fragments come on top


class DoesNotFit(Exception):
    """A micro-batch did not fit into the memory of some process."""


class MicroBatches:
    """Runs the micro-batches of a step, on all processes, and adds up their gradients.

    `parts`: how many pieces each micro-batch of the recipe is cut into. The loss is a sum over the step and dropout a
    function of the token, so that this changes nothing in the result.
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

    def run(self, step: int, batches: Sequence[Sequence[Example]], weight: float, parts: int) -> float:
        """Cross-entropy summed over the step; the gradient of what is minimized, over `weight`, is then in place.

        With fp16 the gradient is scaled, as the scaler has it. Nothing is read back from the device before the last
        micro-batch: it works while the next one is put together here. Raises DoesNotFit, on all processes alike, with
        no gradient left; ProcessLost when one of them is gone. With a sharded base LoraError instead of DoesNotFit:
        while one process cuts, the others would wait for its shares.
        """
        pieces = cut(batches, max(parts, self._fewest_parts(len(batches))))
        losses: list[Tensor] = []
        failed = ""
        if not self.session.model.training:
            self.session.model.train()
        with cast_once(self.session.layers, self.session.dtype), lost_process_is_told():
            for at in range(self.accelerator.process_index, self._passes(pieces), self.accelerator.num_processes):
                try:
                    if at < len(pieces):
                        losses.append(self._forward_backward(pieces[at], step, at, weight))
                    else:
                        self._keep_company(pieces[-1], step, at, weight)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = _first_line(error)
                    if self.recipe.shard_base:
                        raise self._too_large_to_share(pieces[min(at, len(pieces) - 1)], failed) from error
                    break
        total, failed = self._read(losses, failed)
        here = torch.tensor([total, float(bool(failed))], dtype=torch.float64)
        summed, failures = sum_over_processes(self.accelerator, here).tolist()
        if failures:
            self._forget_gradients()
            raise DoesNotFit(failed or "in another process")
        self._add_gradients()
        return summed

    @staticmethod
    def _read(losses: list[Tensor], failed: str) -> tuple[float, str]:
        """(sum of what is on the device, why a micro-batch failed): an allocation there may fail as late as this."""
        if failed or not losses:
            return 0.0, failed
        try:
            return sum(torch.stack(losses).tolist()), ""
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return 0.0, _first_line(error)

    def smaller(self, batches: Sequence[Sequence[Example]], parts: int, problem: DoesNotFit) -> int:
        """Parts with which the largest piece has about half as many tokens.

        Raises LoraError for a single example, and with a sharded base.
        """
        largest = cut(batches, max(parts, self._fewest_parts(len(batches))))[0]
        if self.recipe.shard_base:
            raise self._too_large_to_share(largest, str(problem))
        if len(largest) == 1:
            raise LoraError(
                f"a single example of {len(largest[0].ids):,} tokens does not fit into memory ({problem})",
                where=largest[0].source,
                fix="use train.gradient_checkpointing: full, a smaller data.max_seq_len, or quantization: nf4",
            )
        while len(cut(batches, parts)[0]) >= len(largest):
            parts *= 2
        return parts

    def rehearse(self, first: int, parts: int, say: Callable[[str], None]) -> int:
        """Try the largest micro-batch that this run can have, so that what does not fit shows now and not in the night.

        Returns the parts to begin with: with micro_batch_size: auto the fewest that fit, else more only if need be. Not
        tried is what step `first` brings in about the same size, and what a CPU has ample memory for.
        """
        largest = [self.session.feed.largest()]
        auto = self.recipe.micro_batch_size == "auto"
        if not auto and first == 1 and not self.session.recipe.data.streaming:
            begins = cut(self.session.feed.step(first), parts)[0]
            if _tokens(cut(largest, parts)[0]) <= _HARDLY_LARGER * _tokens(begins):
                return parts
        if not auto and self._is_ample(_tokens(cut(largest, parts)[0])):
            return parts
        fitting = self._fewest_that_fit(largest, parts, auto, say)
        if auto:
            piece = cut(largest, fitting)[0]
            say(f"micro-batches of up to {_tokens(piece):,} tokens fit: a step is cut into up to {fitting}")
        return fitting

    def _is_ample(self, tokens: int) -> bool:
        """Whether a CPU has so much memory that a trial, which costs as much as a step, can be left out.

        Each process looks for itself, and all of them get one answer.
        """
        device = self.session.device
        ample = device.type == "cpu" and _AMPLE * self.session.activations.kept_bytes(tokens) < free_memory_bytes(
            device
        )
        return not agree(self.accelerator, not ample)

    def _fewest_that_fit(self, largest: list[list[Example]], parts: int, auto: bool, say: Callable[[str], None]) -> int:
        too_few = 0
        while (problem := self._trial(largest, parts)) is not None:
            too_few = parts
            parts = self.smaller(largest, parts, problem)
            if not auto:
                say(smaller_from_now_on(problem, parts))
        while auto and parts - too_few > 1:
            middle = (parts + too_few) // 2
            if self._trial(largest, middle) is None:
                parts = middle
            else:
                too_few = middle
        return parts

    def _trial(self, largest: list[list[Example]], parts: int) -> DoesNotFit | None:
        """Forward and backward of the largest piece, forgotten afterwards; None if it fits."""
        piece = cut(largest, parts)[0]
        needed, free = self.session.activations.kept_bytes(_tokens(piece)), free_memory_bytes(self.session.device)
        on_cpu = self.session.device.type == "cpu"
        if agree(self.accelerator, on_cpu and needed > free):  # there the system kills instead of refusing
            return DoesNotFit(f"{human_bytes(needed)} of activations, {human_bytes(free)} free")
        try:
            self.run(1, [piece] * self.accelerator.num_processes, 1.0, 1)
        except DoesNotFit as problem:
            return problem
        self._forget_gradients()
        return None

    def _forward_backward(self, piece: list[Example], step: int, at: int, weight: float) -> Tensor:
        """Cross-entropy of a micro-batch, a scalar on the device; its gradient is added to the parameters'."""
        recipe, session = self.recipe, self.session
        dropout = (recipe.seed, step) if session.recipe.adapter.dropout else None
        batch = session.collate(piece, dropout=dropout)
        _seed(recipe.seed, step, at, session.device)
        with dropout_keys(session.layers, batch.dropout_keys):  # also for what the backward pass computes again
            loss, cross_entropy = training_loss(session.model, batch, z_loss=recipe.z_loss)
            self.scaler.scale(loss / weight).backward()
        return cross_entropy

    def _passes(self, pieces: Sequence[list[Example]]) -> int:
        """Passes of all processes together. With a sharded base each makes as many: a pass needs them all."""
        processes = self.accelerator.num_processes
        return -(-len(pieces) // processes) * processes if self.recipe.shard_base else len(pieces)

    def _keep_company(self, piece: list[Example], step: int, at: int, weight: float) -> None:
        """A pass whose loss and gradients are thrown away: the others need this process's shares of the base."""
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self._forward_backward(piece[:1], step, at, weight)
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            parameter.grad = gradient

    def _too_large_to_share(self, piece: list[Example], problem: str) -> LoraError:
        return LoraError(
            f"a micro-batch of {_tokens(piece):,} tokens does not fit into memory ({problem}), and with "
            "train.shard_base it cannot be cut smaller on the way",
            fix="write train.gradient_checkpointing: full, or a smaller train.micro_batch_size and as much larger a "
            "train.gradient_accumulation_steps, with the same result",
        )

    def _fewest_parts(self, batches: int) -> int:
        """No process goes without: micro_batch_size: auto makes one micro-batch of a step."""
        return -(-self.accelerator.num_processes // batches) if self.recipe.batch_size is not None else 1

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        if self.session.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add_gradients(self) -> None:
        """Sum the adapter's gradients over processes: all that they need to tell each other in a step.

        In one exchange: an adapter is hundreds of small tensors, and each exchange waits for the slowest process.
        """
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        summed = sum_over_processes(self.accelerator, torch.cat([each.flatten() for each in gradients]))
        for parameter, part in zip(self.parameters, summed.split([each.numel() for each in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def smaller_from_now_on(problem: DoesNotFit, parts: int) -> str:
    return f"out of memory ({problem}): each micro-batch is now cut into {parts}; the result stays the same"


def cut(batches: Sequence[Sequence[Example]], parts: int) -> list[list[Example]]:
    """Each micro-batch in up to `parts` pieces of about equal numbers of tokens; the largest of all comes first.

    Largest first: what does not fit shows at once, and the memory that the others need is there.
    """
    pieces = [piece for batch in batches for piece in _in_parts(batch, parts)]
    return sorted(pieces, key=lambda piece: -_tokens(piece))


def _in_parts(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Neighbours stay together: each example goes where its middle lies among the tokens of all."""
    total = _tokens(examples)
    pieces: dict[int, list[Example]] = {}  # in order, and only those with examples: parts may be any number
    before = 0
    for example in examples:
        at = min(parts - 1, int((before + len(example.ids) / 2) * parts / total))
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
    """What a model may draw by itself is a function of seed, step and micro-batch: the same when it is resumed."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(number)  # torch.manual_seed keeps a stack trace for devices that are not there
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
