"""The outermost handler: an exception becomes a message on stderr, a JSON document for --json, and an exit code."""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli.ending import signal_received
from lora_cli.errors import Interrupted, LoraError, Unexpected, command, is_error, reason_of
from lora_cli.streams import finish_results, print_json, print_note

_output: Path | None = None


def keep_tracebacks_in(output: Path) -> None:
    """Name the output folder of this command: once a run is in it, a traceback is written there."""
    global _output  # noqa: PLW0603 - it has to be known after the command has failed
    _output = output


def run(app: Callable[..., Any], arguments: Sequence[str], hint: Callable[..., str | None] = lambda *_: None) -> int:
    """Run the command line and return its exit code. Raises nothing but SystemExit.

    hint: (command, what it does not know or None, its options) → a fix for a mistake on the command line.
    """
    try:
        ended = app(list(arguments), standalone_mode=False)
        if ended != 130:  # typer returns it for Ctrl+C; a command itself returns nothing
            finish_results()
            return int(ended or 0)
        problem = _stopped()
    except BrokenPipeError:  # nobody reads what is printed; no words are needed
        return 1
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code != 130:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        problem = _problem(error, hint)
    print_note(problem.render() if not isinstance(problem, _Stopped) else problem.what)
    if "--json" in arguments and is_first_process():
        with suppress(Exception):
            print_json((problem.result or {}) | {"error": problem.as_dict()})
            finish_results()
    return problem.exit_code


def is_first_process() -> bool:
    """Whether this is the process that reports, of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


class _Stopped(Interrupted):
    """Ctrl+C, SIGTERM or SIGHUP in a command that has nothing to keep."""


def _stopped() -> LoraError:
    return _Stopped("stopped", exit_code=128 + signal_received())


def _problem(error: BaseException, hint: Callable[..., str | None]) -> LoraError:
    if isinstance(error, LoraError):
        return error
    if isinstance(error, (KeyboardInterrupt, SystemExit)) or type(error).__name__ == "Abort":
        return _stopped()
    if hasattr(error, "format_message"):  # typer's usage errors, of click or of the copy of it inside typer
        return _usage(error, hint)
    if isinstance(error, OSError) and error.filename is not None:
        # Paths come from the user, and what a file system can say of them has no end.
        fix = "check the path, its permissions and its disk"
        return LoraError(error.strerror or str(error), where=os.fsdecode(error.filename), fix=fix)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        limits = "limits of this shell or container (ulimit -v, ulimit -u, pids.max)"
        fix = f"raise or remove the {limits}, or set OMP_NUM_THREADS=1"
        return LoraError("no more threads can be started", fix=fix)
    return _unexpected(error)


def _usage(error: Any, hint: Callable[..., str | None]) -> LoraError:
    """A mistake on the command line, in the words and the form of all other errors."""
    words: list[str] = []
    used = context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        words, context = [context.info_name, *words], context.parent
    said = error.format_message().strip().rstrip(".")
    parts = re.fullmatch(r"(.*?)(?:\. (Did you mean .*)| \((Possible options: .*)\))?", said, re.DOTALL)
    what, *hints = parts.groups() if parts is not None else (said,)
    unknown = re.fullmatch(r"No such (?:command|option):? '?(.*?)'?", what)
    options = [name for each in used.command.params for name in each.opts] if used is not None else []
    better = hint(" ".join(words), unknown and unknown[1], options) if unknown or what.startswith("Missing") else None
    fix = better or "; ".join(each[0].lower() + each[1:] for each in hints if each)
    see = f"see {command('lora', *words, '--help')}"
    return LoraError(what[0].lower() + what[1:], fix=f"{fix}; {see}" if fix else see)


def _unexpected(error: BaseException) -> LoraError:
    """An unexpected exception: one line, and a file with the traceback."""
    what = type(error).__name__
    if is_error(error):
        what = f"{what}: {reason_of(error).removeprefix(f'{what}: ')}"
    text = _traceback(error)
    place = _written(text)
    if isinstance(error, MemoryError):
        fix = "close other programs, or use a smaller model, fewer rows or a shorter data.max_seq_len"
        kept = [f"the traceback is in {place}"] if place else []
        return Unexpected("there is not enough memory", details=kept, fix=fix)
    if place is None:
        return Unexpected(
            f"a bug in lora: {what}",
            details=text.splitlines(),
            fix="please report this, with what lora selftest prints",
        )
    return Unexpected(
        f"a bug in lora: {what}", where=place, fix="please report it, with this file and what lora selftest prints"
    )


def _traceback(error: BaseException) -> str:
    """The formatted traceback; where even formatting fails (MemoryError, RecursionError), its places alone."""
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:
        places, at = [], error.__traceback__
        while at is not None and len(places) < 200:
            places.append(f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}\n")
            at = at.tb_next
        return "".join(places)


def _written(text: str) -> str | None:
    """The file that a traceback was written to: in the run's folder, else a temporary or the current folder."""
    for folder in (_folder_of_run, tempfile.gettempdir, Path.cwd):
        with suppress(Exception):
            handle, name = tempfile.mkstemp(prefix="lora-traceback-", suffix=".txt", dir=folder())  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return name
    return None


def _folder_of_run() -> Path:
    if _output is None or not (_output / "recipe.yaml").is_file():
        raise FileNotFoundError("no run has begun")
    return _output
