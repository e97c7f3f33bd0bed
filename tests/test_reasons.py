"""Where several reasons hold, the one that helps is given; and what a fix names works when it is followed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from lora_cli import boundary
from lora_cli.cli import app


@pytest.fixture
def lora(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process; returns exit code and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = boundary.run(app, [str(each) for each in arguments])
        return code, capsys.readouterr().err

    return run


UNKNOWN_ROLE = {"messages": [{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}]}
REFUSED = {
    "an unknown role": (UNKNOWN_ROLE, {}, 2, "narrator"),
    "no target token": ({"prompt": "a", "completion": ""}, {}, 3, "no target token"),
    "empty rows": ({"text": ""}, {}, 3, "empty"),
    "a type": ({"text": 7}, {}, 2, "text"),
    "too long": ({"text": "a b c d " * 40}, {"max_seq_len": 16}, 3, "max_seq_len"),
    "a template that raises": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"template": "raises.jinja"},
        2,
        "not for you",
    ),
    "left out": ({"text": "a", "train": False}, {}, 2, "no row is left to train on"),
    "dropped": ({"text": "a b c d " * 40}, {"max_seq_len": 16, "too_long": "drop"}, 2, "no row is left to train on"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("verb", ["check", "train"])
def test_why_rows_are_refused_is_said_before_what_follows_from_it(lora, recipe_file, tmp_path, case, good, verb):
    """With a fraction for validation, and none or one row of 20 left, the fraction is not the reason."""
    row, settings, code, reason = REFUSED[case]
    (tmp_path / "raises.jinja").write_text("{{ raise_exception('not for you') }}")
    if case in ("left out", "dropped"):
        good = 0
    kind = {key: "fine" for key in row if key in ("text", "prompt", "completion")}
    fine = kind or {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "fine"}]}
    data = write_rows(tmp_path / "rows.jsonl", [fine] * good + [row] * (20 - good))
    recipe = recipe_file(data={"train": str(data), "validation": 0.125, **settings})
    ended, said = lora(verb, recipe)
    assert ended == code, said
    assert reason in said
    assert "0.125" not in said
    assert "fix: " in said


@pytest.mark.parametrize(("rows", "fraction"), [(10, 0.01), (3, 0.9), (2, 0.2)])
def test_the_fraction_that_is_suggested_works(lora, recipe_file, tmp_path, rows, fraction):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {at} of them"} for at in range(rows)])
    recipe = recipe_file(data={"train": str(data), "validation": fraction})
    code, said = lora("check", recipe)
    assert code == 2
    suggested = re.search(r"write (data\.validation): ([\d.]+)", said)
    assert suggested
    code, said = lora("check", recipe, "--set", f"{suggested[1]}={suggested[2]}")
    assert code == 0, said
