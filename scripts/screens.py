"""Walks the path with real commands in a terminal and draws its screens: docs/pictures/*.svg.

    python scripts/screens.py                  # all screens, about five minutes on two CPU cores
    python scripts/screens.py runs help        # after the commands that they need, only these are drawn
    python scripts/screens.py --width 60       # nothing is drawn: prints the screens and names the words that are cut

The commands run in a temporary folder, with SmolLM2-135M-Instruct and the questions and answers of benchmarks/faq.py.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
MODEL = "SmolLM2-135M-Instruct"
WIDTH = 100
RUN = f"runs/{MODEL}-faq"

CHAT: list[Any] = [
    {
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "What is the capital of Iceland?"},
            {"role": "assistant", "content": "Reykjavík."},
            {"role": "user", "content": "And how many people live there?"},
            {"role": "assistant", "content": "About 140,000,\nmore than a third of the country."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Name a prime above 10."},
            {"role": "assistant", "content": "Twelve.", "train": False},
            {"role": "user", "content": "That is no prime."},
            {"role": "assistant", "content": "Right: 11."},
        ]
    },
]
TROUBLE: list[Any] = [
    *({"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(6) for b in range(5)),
    {"prompt": "2 + 3 =", "completion": " 5"},
    {"prompt": "9 + 9 =", "completion": ""},
    {"prompt": "Count to two hundred.", "completion": " ".join(map(str, range(1, 201)))},
    {"prompt": "   ", "completion": " "},
    {"prompt": 7, "completion": " seven"},
]
COMMANDS = ("init", "check", "train", "generate", "chat", "eval", "merge", "runs")
SMALL = f"base_model: {MODEL}\ndata: {{train: FILE, max_seq_len: 256}}\noutput: runs/small\n"


@dataclass(frozen=True)
class Shot:
    """A screen: its commands, what is typed at their prompts, and, where it shows a moment, what appears then."""

    commands: tuple[str, ...]
    typed: tuple[str, ...] = ()
    moment: str = ""
    codes: tuple[int, ...] = field(default=(0,))


SHOTS = {  # in the order of the path: each finds what those before it made
    "help": Shot(("lora --help",)),
    "init": Shot((f"lora init {MODEL} faq.csv", "cat recipe.yaml")),
    "check": Shot(("lora check recipe.yaml --show 1",)),
    "check-chat": Shot(("lora check chat.yaml --show 2",)),
    "check-gate": Shot(("lora check trouble.yaml --show 1",), codes=(2, 3)),
    "error": Shot(
        ("lora train recipe.yaml --set adapter.rnak=8", "lora check recipe.yml", "lora export runs/faq"), codes=(2,)
    ),
    "train": Shot(("lora train recipe.yaml",), moment=r"step [124]\d/"),
    "generate": Shot((f'lora generate {RUN} "What is the price of the Brio?"',)),
    "chat": Shot((f"lora chat {RUN}",), ("How much water does the Alba hold?", "/base", "/again", "/help", "\x04")),
    "eval": Shot((f"lora eval {RUN}",)),
    "merge": Shot((f"lora merge {RUN} --output merged",)),
    "runs": Shot(
        (
            "lora train recipe.yaml --set output=runs/short --set train.epochs=1",
            "lora runs --per-hour 0.40",
            f"lora runs {RUN} runs/short",
        )
    ),
}


class Terminal:
    """What a terminal of some columns shows: characters with their colours, for what our commands write."""

    def __init__(self, width: int):
        self.width, self.rows, self.row, self.column, self.colour = width, [[]], 0, 0, ""
        self.cut: list[str] = []

    def feed(self, text: str) -> None:
        for escape, how, control, plain in re.findall(
            r"(\x1b\[([\d;?]*[A-Za-z])|\x1b[^\[])|([\r\n\b\a])|([^\x1b\r\n\b\a]+)", text
        ):
            if escape:
                self._escape(how)
            elif control:
                self.column = {"\r": 0, "\b": max(0, self.column - 1)}.get(control, self.column)
                self.row += control == "\n"
            for each in plain:
                self._put(each)
            while len(self.rows) <= self.row:
                self.rows.append([])

    def _put(self, each: str) -> None:
        if self.column == self.width:
            if " " not in (each, self.rows[self.row][-1][0]):
                self.cut.append("".join(cell[0] for cell in self.rows[self.row])[-20:] + "|" + each)
            self.row, self.column = self.row + 1, 0
            while len(self.rows) <= self.row:
                self.rows.append([])
        row = self.rows[self.row]
        row += [(" ", "")] * (self.column + 1 - len(row))
        row[self.column] = (each, self.colour)
        self.column += 1

    def _escape(self, how: str) -> None:
        number = int(how[:-1]) if how[:-1].isdigit() else 1
        if how.endswith("m"):
            self.colour = "" if how in ("m", "0m") else self.colour + f"\x1b[{how}"
        elif how.endswith("A"):
            self.row = max(0, self.row - number)
        elif how.endswith("D"):
            self.column = max(0, self.column - number)
        elif how in ("K", "0K"):
            del self.rows[self.row][self.column :]
        elif how == "2K":
            self.rows[self.row] = []

    def plain(self) -> str:
        return "\n".join("".join(each for each, _ in row).rstrip() for row in self.rows).rstrip()

    def text(self) -> Text:
        lines = []
        for row in self.rows[: self.plain().count("\n") + 1]:
            colours = ["", *(colour for _, colour in row)]
            lines.append(
                "".join(
                    (f"\x1b[0m{colour}" if colour != colours[at] else "") + each
                    for at, (each, colour) in enumerate(row)
                )
                + "\x1b[0m"
            )
        return Text("\n").join(Text.from_ansi(line) for line in lines)


def run(command: str, terminal: Terminal, shot: Shot, folder: Path) -> Terminal | None:
    """Runs a command in a terminal of its own; returns the moment that the shot wants, if it came."""
    terminal.feed(f"\x1b[1m$ {command}\x1b[0m\r\n")
    words = shlex.split(command)
    words = [sys.executable, "-m", "lora_cli", *words[1:]] if words[0] == "lora" else words
    process, end = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", PYTHONPATH=str(ROOT))
        os.environ.pop("COLUMNS", None)
        os.execvp(words[0], words)
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, terminal.width, 0, 0))
    typed, moment, left = list(shot.typed), None, b""
    while True:
        if not select.select([end], [], [], 0.1)[0]:  # a frame is whole
            shown = terminal.plain()
            if shot.moment and moment is None and re.search(shot.moment, shown):
                moment = Terminal(terminal.width)
                moment.rows = [list(row) for row in terminal.rows]
            if typed and shown.endswith("\n>"):
                time.sleep(0.5)
                os.write(end, (typed[0] + ("" if typed[0] < " " else "\n")).encode())
                del typed[0]
                time.sleep(0.5)
            continue
        try:
            left += os.read(end, 2**16)
        except OSError:  # it has ended
            break
        whole = left.decode("utf-8", "ignore")
        left = left[len(whole.encode()) :]
        terminal.feed(whole)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(end)
    if code not in shot.codes:
        sys.exit(f"{terminal.plain()}\n{command} ended with {code}")
    return moment


def picture(text: Text, title: str) -> str:
    console = Console(record=True, width=WIDTH, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(text, highlight=False, no_wrap=True, overflow="ignore", crop=False)
    # Without rich's web font and address: a picture fetches nothing. And the last line keeps its underscores.
    font = CONSOLE_SVG_FORMAT[CONSOLE_SVG_FORMAT.index("@font-face") : CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")]
    ours = {font: "", "<!-- Generated with Rich https://www.textualize.io -->": "", "{terminal_height}": "{height}"}
    ours["Fira Code"] = "ui-monospace, Menlo, Consolas"
    plain = CONSOLE_SVG_FORMAT
    for theirs, own in ours.items():
        plain = plain.replace(theirs, own)
    return console.export_svg(title=title, code_format=plain, unique_id=title.replace(" ", "-"))


def prepare(folder: Path) -> None:
    from real_model import make_real_model

    model = make_real_model(ROOT / "build" / MODEL.lower(), ROOT / "build" / "downloads")
    shutil.copytree(model, folder / MODEL)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "faq.py", "write", folder], check=True)
    for name, rows in (("chat", CHAT), ("trouble", TROUBLE)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(SMALL.replace("FILE", f"{name}.jsonl"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the screens of the path.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHOTS)}; default: all")
    parser.add_argument("--width", type=int, help="print the screens at this many columns, and draw nothing")
    given = parser.parse_args()
    helps = {"helps": Shot(tuple(f"lora {each} --help" for each in COMMANDS))} if given.width else {}
    wanted = set(given.names or SHOTS | helps)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for name, shot in (SHOTS | helps).items():
            if not wanted:
                break
            terminal, moment = Terminal(given.width or WIDTH), None
            for at, command in enumerate(shot.commands):
                terminal.feed("\r\n" * bool(at))
                short = given.width and shot.codes == (0,) and command.startswith("lora train")
                few = " --set train.max_steps=24 --set train.eval_every=8" * bool(short)
                moment = run(command + few, terminal, shot, folder) or moment
            if name in wanted:
                wanted.remove(name)
                show(name, terminal, moment, draw=not given.width)


def show(name: str, terminal: Terminal, moment: Terminal | None, *, draw: bool) -> None:
    if not draw:
        print(terminal.plain(), *(f"CUT: {each}" for each in terminal.cut), sep="\n", flush=True)
        return
    for file, shown in ((name, terminal), (f"{name}-running", moment)):
        if shown:
            (PICTURES / f"{file}.svg").write_text(picture(shown.text(), f"lora {name}"), encoding="utf-8")
            print(f"docs/pictures/{file}.svg", flush=True)


if __name__ == "__main__":
    main()
