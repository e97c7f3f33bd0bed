"""`lora chat`: a conversation in the terminal. What is said stays in memory; only /save writes it."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli.adapters.named import Named, read_named
from lora_cli.ending import interrupted_by_ctrl_c
from lora_cli.errors import LoraError, home_expanded, refuse_if
from lora_cli.evaluation.generate import Speaker
from lora_cli.evaluation.generation import Completion
from lora_cli.streams import print_note, print_piece

_HELP = '''\
/adapter NAME     let this adapter (a run or a folder) answer from now on; without NAME, list those that are loaded
/base             let the base model alone answer, as does /adapter none
/again            answer the last message again, for example after /base
/system TEXT      begin anew with this system message; without TEXT, with none
/reset            begin anew
/save FILE        write the conversation to a new file, as one row of chat data
/quit             end; so does Ctrl+D
"""               begin and end a message of several lines with three quotes
Ctrl+C ends an answer, or drops the line that you are typing.'''


def chat(named: Named, *, system: str | None, **speaking: Any) -> None:
    """Talk to a model until the end of input. speaking: further arguments of `Speaker`."""
    speaker = Speaker(named, default="template", **speaking)
    if speaker.prompting.template is None:
        print_note("note: without a chat template nothing is remembered: each message is completed by itself")
    opening = speaker.prompting.opening(system)
    if sys.stdin.isatty():
        with suppress(ImportError):  # line editing and history; Windows' console has its own
            import readline  # noqa: F401
        print_note("/help lists the commands; Ctrl+D ends the conversation.")
    _Conversation(speaker, opening).hold()


class _Conversation:
    """turns: as a template takes them, the system message first, and beside each answer who gave it."""

    def __init__(self, speaker: Speaker, opening: list[dict[str, str]]):
        self.speaker = speaker
        self._begin(opening)

    def _begin(self, opening: list[dict[str, str]]) -> None:
        self.opening, self.turns = opening, [*opening]

    def hold(self) -> None:
        while True:
            try:
                typed = _read()
            except EOFError:
                print_piece("\n" if sys.stdin.isatty() else "")
                return
            except KeyboardInterrupt:
                if not interrupted_by_ctrl_c():
                    raise
                print_note("\nCtrl+D ends the conversation.")
                continue
            except UnicodeDecodeError:
                print_note("error: this line is not text in the encoding of the terminal\n  fix: type it again")
                continue
            if typed.strip() == "/quit":
                return
            try:
                if typed.startswith("/"):
                    self._command(*typed.strip().partition(" ")[::2])
                elif typed.strip():
                    self.turns.append({"role": "user", "content": typed})
                    self._answer()
            except LoraError as error:  # of this message; the conversation goes on
                print_note(error.render())

    def _answer(self) -> None:
        """Answers the last turn, which is taken back if that fails: the next message is not to follow it."""
        pieces: list[str] = []

        def emit(piece: str) -> None:
            pieces.append(piece)
            print_piece(piece)

        try:
            ended: Completion | None = self.speaker.answer(self.turns, emit)
        except KeyboardInterrupt:
            if not interrupted_by_ctrl_c():
                raise
            ended = None
        except BaseException:
            self.turns.pop()
            raise
        print_piece("\n")
        if ended is None and not "".join(pieces).strip():
            self.turns.pop()
            print_note("(stopped before an answer; your message is taken back)")
            return
        self.turns.append({"role": "assistant", "content": "".join(pieces) if ended is None else ended.text})
        if ended is None:
            print_note("(stopped)")
        elif not ended.text.strip():
            print_note(f"({self.speaker.prompting.why_empty(ended)})")
        elif ended.stop is None:
            print_note(f"({self.speaker.why_cut(ended)})")

    def _command(self, name: str, text: str) -> None:
        if name == "/help":
            print_note(_HELP)
        elif name in ("/base", "/adapter"):
            self._switch("none" if name == "/base" else text.strip())
        elif name == "/again":
            if not self.turns or self.turns[-1]["role"] == "system":
                raise LoraError("there is no message to answer", fix="type one")
            if self.turns[-1]["role"] == "assistant":
                self.turns.pop()
            self._answer()
        elif name == "/system":
            if text and self.speaker.prompting.template is None:
                raise LoraError("without a chat template there is no system message", fix="start with --template")
            self._begin(self.speaker.prompting.opening(text.strip()))
            print_note("a new conversation, with this system message" if text else "a new one, without system message")
        elif name == "/reset":
            self._begin(self.opening)
            print_note("a new conversation")
        elif name == "/save":
            self._save(text.strip())
        else:
            raise LoraError(f"there is no command {name}", fix="/help lists them; begin a message with a blank instead")

    def _switch(self, name: str) -> None:
        """Let another adapter answer, which is read from disk the first time; `none`: the base; nothing: list them."""
        speaker = self.speaker
        if not name:
            names = {each: each for each in speaker.prompted} | {"none": None}
            print_note("\n".join(f"{'*' if own == speaker.name else ' '} {each}" for each, own in names.items()))
            return
        if name in ("none", "null", "base"):
            if not speaker.prompted:
                fix = "load one with /adapter NAME, or start with a run or an adapter: lora chat RUN"
                raise LoraError("this model has no adapter", fix=fix)
            speaker.use(None)
            print_note("the base model alone answers")
            return
        before = speaker.prompting
        found = [each for each in speaker.prompted if name == each] or [
            each for each in speaker.prompted if name == Path(each).name
        ]
        if len(found) == 1:
            speaker.use(found[0])
        else:
            speaker.hold(name, *read_named(name, speaker.opened.source.name))
        print_note(f"{speaker.name} answers")
        if speaker.prompting.system not in (None, before.system):
            print_note(f"note: it was trained with a system prompt: /system {speaker.prompting.system} begins with it")

    def _save(self, name: str) -> None:
        refuse_if(not name, "/save needs a file name", fix="for example /save chat.jsonl")
        path = Path(home_expanded(name))
        content = json.dumps({"messages": self.turns}, ensure_ascii=False) + "\n"
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            raise LoraError("this file exists", where=name, fix="name another") from None
        except OSError as error:
            raise LoraError(f"it cannot be written: {error.strerror}", where=name, fix="name another file") from None
        print_note(f"{len(self.turns)} turns in {name}")


def _read() -> str:
    """A line, or between two lines of three quotes several. Raises EOFError at the end of input."""
    line = _line("> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(_line(". "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() and sys.stdout.isatty() else "")
