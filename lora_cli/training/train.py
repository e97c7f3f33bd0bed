"""`lora train`: from a recipe to a run and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from lora_cli.base.load import load_model
from lora_cli.errors import Interrupted
from lora_cli.recipe import Recipe
from lora_cli.screen import say_on
from lora_cli.training.loop import Run
from lora_cli.training.opening import open_session
from lora_cli.training.processes import process_lost_errors, start_accelerator
from lora_cli.training.resume import (
    changes_of_environment,
    changes_of_recipe,
    environment_of,
    refuse_other_run,
    require_known,
    rounding_note,
)
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.run_lock import locked
from lora_cli.training.stopping import Stop
from lora_cli.training.trackers import require_trackers


def train(
    recipe: Recipe,
    console: Console,
    *,
    resume: bool = False,
    allow: Sequence[str] = (),
    max_hours: float | None = None,
    load: Callable[..., Any] = load_model,
    before_step: Callable[[Run], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a recipe to its end; returns the report that is also written to report.json.

    allow: settings, sections, `data` or `versions` that may have changed since a resumed run began.
    load: where the base comes from, see `open_model`. before_step: see `Run`.
    Raises Interrupted after Ctrl+C, SIGTERM, SIGHUP or max_hours, with a checkpoint written; CheckFailed when the loss
    is not finite or nothing was learned; DiskError when a checkpoint, metrics or the adapter cannot be written.
    """
    require_known(allow)
    folder = RunFolder(Path(recipe.output), remote_code=recipe.trust_remote_code)
    require_trackers(recipe.trackers)
    accelerator = start_accelerator(recipe)
    console.quiet |= not accelerator.is_main_process
    say = say_on(console)

    def say_and_show_cursor(text: str) -> None:
        say(text)
        console.show_cursor()  # a second signal ends the process before the live display can

    stop = Stop(say_and_show_cursor, max_seconds=max_hours and max_hours * 3600, processes=accelerator.num_processes)
    with process_lost_errors(folder.resume_command()), stop.listening(), ExitStack() as held:
        try:
            if accelerator.is_main_process:
                folder.refuse_if_taken(resume)
                held.enter_context(locked(folder.path, say))
                folder.refuse_if_taken(resume)  # by a run that ended in between
                folder.clear_after_a_kill()
            accelerator.wait_for_everyone()
            run = _open(recipe, folder, accelerator, console, stop, resume, allow, load)
            run.before_step = before_step
            return run.to_the_end()
        except KeyboardInterrupt:
            if not stop.requested:
                raise
            what = f"stopped: {stop.why}"
            raise Interrupted(what, exit_code=stop.exit_code, where=folder.path, fix="start it again") from None


def _open(
    recipe: Recipe,
    folder: RunFolder,
    accelerator: Accelerator,
    console: Console,
    stop: Stop,
    resume: bool,
    allow: Sequence[str],
    load: Callable[..., Any],
) -> Run:
    """A run that is ready for its next step. Raises LoraError if a resumed run would not be the same run."""
    stored = folder.stored_recipe() if resume else recipe
    changes = changes_of_recipe(stored, recipe)
    refuse_other_run(changes, allow, folder.recipe)
    moved = stored.output != recipe.output
    if recipe.revision is None and recipe.base_model == stored.base_model:
        recipe = recipe.model_copy(update={"revision": stored.revision})
    session = open_session(recipe, console, load)
    environment = environment_of(session, accelerator.num_processes)
    began = folder.stored_environment() if resume else environment
    other = changes_of_environment(began, environment)
    refuse_other_run(other, allow, folder.path)
    changes += other
    if note := rounding_note(began, environment):
        say_on(console)(note)
    accelerator.wait_for_everyone()  # every process has compared before one writes
    run = Run(session, folder, accelerator, console, stop, environment)
    if resume:
        run.go_back(changes)
        run.tried = run.state.step > 0 and not changes and note is None
    if accelerator.is_main_process and (changes or moved or not resume):
        kept = recipe.model_copy(update={"revision": session.source.revision})
        history = began.get("changed", [])
        history += [{"after_step": run.state.step, "changes": [each.said for each in changes]}] if changes else []
        folder.begin(kept, environment | ({"changed": history} if history else {}))
    return run
