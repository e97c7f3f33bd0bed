"""Draws the pictures of docs/data.md: what `lora check` prints, for a few rows of several kinds.

python scripts/data_pictures.py
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

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


def main() -> None:
    from real_model import make_real_model

    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    make_real_model(ROOT / "build" / "smollm2-135m-instruct", ROOT / "build" / "downloads")
    pictures = ROOT / "docs" / "pictures"
    pictures.mkdir(exist_ok=True)
    (pictures / "check-chat.svg").write_text(picture(CHAT, show=2, max_seq_len=512), encoding="utf-8")
    (pictures / "check-gate.svg").write_text(picture(TROUBLE, show=1, max_seq_len=256), encoding="utf-8")


def picture(rows: list[Any], show: int, max_seq_len: int) -> str:
    from lora_cli.planning.check import check, print_checked
    from lora_cli.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        recipe = Recipe.model_validate(
            {
                "base_model": str(ROOT / "build" / "smollm2-135m-instruct"),
                "data": {"train": str(path), "max_seq_len": max_seq_len},
                "output": f"{folder}/run",
            }
        )
        console = Console(record=True, width=104, force_terminal=True, color_system="truecolor", file=io.StringIO())
        console.print("$ lora check recipe.yaml", highlight=False)
        print_checked(check(recipe), console, show)
    for there, shown in ((f"{folder}/", ""), (f"{ROOT}/build/", "")):
        for segment in range(len(console._record_buffer)):
            each = console._record_buffer[segment]
            console._record_buffer[segment] = each._replace(text=each.text.replace(there, shown))
    # Without rich's web font: a picture fetches nothing.
    style = CONSOLE_SVG_FORMAT[CONSOLE_SVG_FORMAT.index("@font-face") : CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")]
    plain = CONSOLE_SVG_FORMAT.replace(style, "").replace("Fira Code", "ui-monospace, Menlo, Consolas")
    return console.export_svg(title="lora check", code_format=plain)


if __name__ == "__main__":
    main()
