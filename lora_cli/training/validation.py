"""Validation during a run: the base's loss, the adapter's loss, and which adapter is the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from accelerate import Accelerator
from torch import Tensor

from lora_cli.adapters.trained import adapters_disabled, cast_once
from lora_cli.data.store import rows_per_micro_batch
from lora_cli.errors import LoraError
from lora_cli.evaluation.perplexity import example_losses
from lora_cli.training.processes import sum_over_processes
from lora_cli.training.session import Session
from lora_cli.training.state import State


class Validator:
    """Scores the validation examples. The loss of each is kept, so that a gain can be given with its interval."""

    def __init__(self, session: Session, accelerator: Accelerator, should_stop: Callable[[], bool]):
        self.session, self.accelerator = session, accelerator
        # Processes that stop at different places would wait for each other, so with several none stops here.
        self.should_stop = should_stop if accelerator.num_processes == 1 else None

    @property
    def has_data(self) -> bool:
        return bool(self.session.feed.validation)

    def score_base(self, state: State) -> float:
        """Loss of the model without its adapter, which the run has to beat. Raises EvaluationStopped."""
        with adapters_disabled(self.session.model):
            losses, targets = self.losses(state)
        state.tensors |= {"validation.base": losses, "validation.targets": targets}
        state.base_validation_loss = losses.sum().item() / int(targets.sum())
        return state.base_validation_loss

    def score_step(self, state: State) -> tuple[float, bool]:
        """(loss of the current adapter, whether it is the best so far). Raises EvaluationStopped."""
        losses, targets = self.losses(state)
        loss = losses.sum().item() / int(targets.sum())
        state.last_validation_loss = loss
        best = math.isfinite(loss) and (state.best_validation_loss is None or loss < state.best_validation_loss)
        state.evaluations_since_best = 0 if best else state.evaluations_since_best + 1
        if best:
            state.best_validation_loss, state.best_step = loss, state.step
            state.tensors["validation.best"] = losses
        return loss, best

    def require_fit(self, state: State) -> None:
        """Raises LoraError unless the checkpoint has one loss for each of this run's validation examples."""
        counts = {len(each) for each in state.tensors.values()}
        if counts - {len(self.session.feed.validation)}:
            raise LoraError(
                f"the checkpoint has losses of {max(counts)} validation examples, "
                f"but the data has {len(self.session.feed.validation)}",
                where=self.session.recipe.output,
                fix="remove the newest checkpoint to continue from the one before it",
            )

    def forget(self, state: State) -> None:
        """Drop losses of other data or of another base."""
        state.base_validation_loss = state.best_validation_loss = state.best_step = state.last_validation_loss = None
        state.evaluations_since_best, state.tensors = 0, {}
        if state.pending is not None:
            state.pending.pop("validation_loss", None)

    def losses(self, state: State) -> tuple[Tensor, Tensor]:
        """Nats of each validation example and its target tokens, noted nowhere. Raises EvaluationStopped."""
        session, accelerator = self.session, self.accelerator
        examples = session.feed.validation
        train = session.recipe.train
        rows = math.ceil(rows_per_micro_batch(session.recipe) / state.parts)
        budget = train.tokens_per_micro_batch or rows * session.recipe.data.max_seq_len
        with cast_once(session.layers, session.dtype):
            losses, targets = example_losses(
                session.model,
                examples,
                session.collate,
                max(int(examples.lengths.max()), budget),
                should_stop=self.should_stop,
                share=(accelerator.process_index, accelerator.num_processes),
            )
        return sum_over_processes(accelerator, losses).cpu(), sum_over_processes(accelerator, targets).cpu()
