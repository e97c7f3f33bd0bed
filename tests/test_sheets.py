"""Spreadsheets as people export them: init, check and train without touching the file, or one message what to do."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from conftest import quiet_console

from lora_cli.data.gate import GateClosed
from lora_cli.errors import LoraError
from lora_cli.planning.check import check
from lora_cli.planning.first_recipe import write_first_recipe
from lora_cli.recipe import load_recipe
from lora_cli.training.train import train

ROWS = [
    [f"Wie viel ist {at} plus {at}, genau?", f"{at} plus {at} ist {2 * at}; natürlich.", "Zahlen"] for at in range(60)
]


def sheet(rows: list[list[str]], delimiter: str = ",", ends: str = "\r\n", header: tuple[str, ...] = ()) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ends)
    writer.writerows([header or ("Question", "Answer", "Category"), *rows])
    return text.getvalue()


QUOTED = [[f"{asked}\n(Bitte.)", f"„{answer}“\n\nMit Gruß", kind] for asked, answer, kind in ROWS]
EMPTY = [[asked, answer if at % 20 else "", ""] for at, (asked, answer, _) in enumerate(ROWS)]
SHEETS: dict[str, tuple[bytes, str | None]] = {  # what → the file, and what is said instead of training
    "commas": (sheet(ROWS).encode(), None),
    "semicolons, as Excel saves them in Europe": (sheet(ROWS, ";").encode("cp1252"), None),
    "with a byte order mark": (sheet(ROWS).encode("utf-8-sig"), None),
    "Unicode text, as Excel saves it": (sheet(ROWS, "\t").encode("utf-16"), None),
    "capitals and blanks": (sheet(ROWS, header=("QUESTION ", " ANSWER", "Category")).encode(), None),
    "quoted line ends": (sheet(QUOTED).encode(), None),
    "line ends of an old Mac": (sheet(ROWS, ";", "\r").encode(), None),
    "empty cells": (sheet(EMPTY).encode(), "no target token"),
    "merged cells above the header": (f"Our FAQ,,\r\n{sheet(ROWS)}".encode(), "remove the first line: `tail -n +2 "),
    "a header with empty cells": (sheet(ROWS, header=("", "Question", "")).encode(), "such as: lora init "),
}  # fmt: skip


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_trains_as_it_is_or_one_message_says_what_to_do(name: str, tiny_llama: Path, tmp_path: Path):
    content, said = SHEETS[name]
    (tmp_path / "faq.csv").write_bytes(content)

    def first() -> Any:
        return write_first_recipe(str(tiny_llama), [str(tmp_path / "faq.csv")], tmp_path / "r.yaml", gpu="8GB")

    if said is not None:
        with pytest.raises(LoraError) as error:
            first()
        shown = error.value.render()
        assert said in shown
        assert shown.count("fix: ") == 1
        assert not isinstance(error.value, GateClosed) or len(error.value.stopping) == 1
        return
    made = first()
    assert made.recipe.data.format == "instruction"
    assert made.recipe.data.validation == 0.14
    assert any("Windows-1252" in note for note in made.notes) == ("Europe" in name)
    recipe = load_recipe(tmp_path / "r.yaml", ["train.max_steps=2", "train.eval_every=null"])
    checked = check(recipe)
    checked.require_ok()
    trained = checked.as_dict(60)["examples"]
    assert trained == 52
    assert train(recipe, quiet_console())["steps"] == 2
