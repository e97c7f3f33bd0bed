"""What a person reads is plain English: phrases that were on screens and in docs, and must not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

COMPARED = "longer|better|worse|more|less|lower|higher|larger|smaller|shorter|other|such"
PHRASES = {  # what is wrong: what to write instead
    rf"(?<!\bthere )\b(is|are) no (?!{COMPARED})": "is not a",
    r"(?<!there is )\bno number\b": "NaN or infinity; not a number",
    r"\bstands? (twice|against|behind|in place|beside|there)\b": "is set twice; contradicts; is shown behind",
    r"\bshall\b": "should, must or will",
    r"\bmend(s|ed|ing)?\b": "repair, correct",
    r"\bof (mine|ours) (is|and|,)": "that lora wrote",
    r"\bdear\b": "expensive",
    r"\baloud\b": "say that it is said, and where",
    r"\b(is|are|be|was|were) told\b(?! apart| from)": "is reported, is shown",
    r"\bonce more\b": "again",
    r"\bthat it be\b": "that it is",
    r"\bany more: \b|\bbut for (rounding|that)\b": "no longer; except for",
    r"\bin force\b": "apply",
    r"\bthe data gate\b|\bthe gate (found|has)\b": "the checks",
    r"\bwant(s|ed)? to run\b": "asks to execute",
    r"\bis nothing that\b": "unknown",
    r"\bif (it|that|they) (is|are) meant\b": "if it is intended",
    r"\bgo(es)? again\b": "is removed",
    r"\bkeeps? (\w+ )?alone\b": "save only",
    r"\bin an earlier life\b": "before it was resumed",
    r"\bhalf a character|halves of (a )?characters?\b": "a lone surrogate",
}


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string and docstring of a module, of every line of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for at, line in enumerate(node.value.splitlines()):
                yield node.lineno + at, line


def found_in(text: str) -> list[str]:
    return [phrase for phrase in PHRASES if re.search(phrase, text, re.IGNORECASE)]


READ = [
    *(path for kind in ("*.py", "*.jinja") for path in sorted((ROOT / "lora_cli").rglob(kind))),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]


def test_no_such_phrase_is_left():
    paths = {path: path.relative_to(ROOT).as_posix() for path in READ}
    wrong = [
        f"{name}:{line}: {text.strip()}\n    write instead: {'; '.join(PHRASES[each] for each in found)}"
        for path, name in paths.items()
        for line, text in strings_of(path)
        if (found := found_in(text))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "the loss of this step is no number",
        "the key base_model stands twice",
        "findings that shall not stop the run",
        "mend or remove this line",
        "this is no preview of mine, and would be lost",
        "cheap to compute again, dear to keep",
        "duplicates are told and do not stop",
    ],
)
def test_a_phrase_of_the_list_is_found(text, tmp_path):
    module = tmp_path / "module.py"
    module.write_text(f'"""Fine."""\n\n\ndef f(x):\n    raise ValueError(f"{{x}}: {text}")\n')
    assert [line for line, each in strings_of(module) if found_in(each)] == [5]


@pytest.mark.parametrize(
    "text", ["there is no adapter in it", "it is no longer there", "B stands for zero", "is no better"]
)
def test_plain_english_is_not(text):
    assert not found_in(text)
