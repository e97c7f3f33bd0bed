"""The model's words during a run: what base and adapter answer to its prompts. Nothing that is computed feels it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from lora_cli.adapters.trained import adapters_disabled, cast_once
from lora_cli.base.trials import in_mode
from lora_cli.evaluation.generation import complete, generation_config
from lora_cli.evaluation.perplexity import EvaluationStopped
from lora_cli.evaluation.samples import MOST_CHARACTERS, MOST_NEW_TOKENS, Prompt, shortened
from lora_cli.training.optimizer import averaged_weights
from lora_cli.training.progress import Progress
from lora_cli.training.random_states import random_states_kept
from lora_cli.training.run_folder import read_samples
from lora_cli.training.session import Session
from lora_cli.training.stored import Sample
from lora_cli.training.trackers import Track
from lora_cli.training.verdict import on_one_line
from lora_cli.training.writer import RunWriter

_SHOWN = (26, 42)  # characters of a prompt and of its answer


class Sampler:
    """Answers the prompts of a session, says the words and keeps them in samples.jsonl. Of several processes one does.

    should_stop: asked before each token, where there is one process.
    """

    def __init__(self, session: Session, accelerator: Accelerator, writer: RunWriter, should_stop: Callable[[], bool]):
        self.session, self.accelerator, self.writer, self.should_stop = session, accelerator, writer, should_stop

    def is_due(self, step: int, *, last: bool) -> bool:
        every = self.session.recipe.train.sample_every
        return every is not None and (last or step % every == 0)

    def sample(self, step: int, progress: Progress | None = None, track: Track | None = None) -> None:
        """The answers at a step, unless they are there; at 0 those of the base alone.

        progress: of the steps; without it the model holds the adapter that is kept. Raises EvaluationStopped, and then
        none of the answers is written.
        """
        if not self.session.prompts:
            return
        if progress is not None:
            progress.doing("answering prompts")
        if self.accelerator.is_main_process:
            known = {(each.number, each.prompt) for each in self._known() if each.step == step}
            asked = [each for each in enumerate(self.session.prompts, 1) if (each[0], each[1].shown) not in known]
            weights = nullcontext() if progress is None else averaged_weights(self.writer.optimizer)
            with weights, self._undisturbed(), nullcontext() if step else adapters_disabled(self.session.model):
                found = [self._answer(step, number, prompt) for number, prompt in asked]
            self.writer.append(self.writer.folder.samples, [each.model_dump() for each in found])
            if track is not None and found:
                track({}, step, found)
            for each in found:
                prompt, words = (on_one_line(*each) for each in zip((each.prompt, each.words), _SHOWN, strict=True))
                self.session.say(f"{'sample' if step else 'base':9}{prompt} → {words}")
        self.accelerator.wait_for_everyone()

    def report(self, kept: int) -> list[dict[str, Any]] | None:
        """report["samples"]: for each prompt the words of base, steps, and the adapter that is kept, of step `kept`."""
        known, found = self._known(), []
        for number, prompt in enumerate(self.session.prompts, 1):
            own = [each for each in known if (each.number, each.prompt) == (number, prompt.shown)]
            words = {each.step: each.words for each in sorted(own, key=lambda each: each.step)}
            steps = [{"step": step, "text": text} for step, text in words.items() if step]
            own = {"base": words.get(0), "adapter": words.get(kept), "steps": steps}
            found.append({"prompt": prompt.shown, "wanted": prompt.wanted, **own})
        return found or None

    def _known(self) -> list[Sample]:
        return read_samples(self.writer.folder.samples)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Within, the model generates; afterwards it, and what is drawn from, are as before.

        Compiled blocks would be compiled anew, each for its place in the cache of keys and values.
        """
        session = self.session
        with (
            random_states_kept(),
            in_mode(session.model, training=False),
            cast_once(session.layers, session.dtype),
            torch.compiler.set_stance("force_eager"),
        ):
            yield

    @cached_property
    def _config(self) -> GenerationConfig:
        session = self.session
        stop = session.prompts[0].stop
        return generation_config(session.model, session.tokenizer, max_new_tokens=MOST_NEW_TOKENS, stop=stop)

    def _answer(self, step: int, number: int, prompt: Prompt) -> Sample:
        """A model that fails at this does not end the run."""

        def emit(_: str) -> None:
            if self.accelerator.num_processes == 1 and self.should_stop():
                raise EvaluationStopped

        model, tokenizer = self.session.model, self.session.tokenizer
        values: dict[str, Any] = {"text": None, "stop": None, "new_tokens": 0}
        try:
            (found,) = complete(model, tokenizer, [prompt.ids], self._config, emit=emit)
            values = {"text": shortened(found.text, MOST_CHARACTERS), "stop": found.stop, "new_tokens": found.tokens}
        except EvaluationStopped:
            raise
        except Exception as error:  # whatever a model's own code raises
            values["error"] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return Sample(step=step, number=number, prompt=prompt.shown, wanted=prompt.wanted, **values)
