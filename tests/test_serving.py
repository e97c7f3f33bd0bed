"""docs/serving.md: its Python blocks run as they are written there, and answer what `lora generate` answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_rows

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
QUESTION = "How long is the warranty?"


def block(heading: str) -> str:
    found = re.search(r"```python\n(.*?)```", PAGE.split(f"## {heading}\n")[1], re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def served(run_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> str:
    """The answer of `lora generate`. The current folder has a run and the merged model, named as in the page."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Three years and a day."}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    settings = {
        "data": {"train": str(rows), "template": "chatml", "max_seq_len": 128},
        "adapter": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "train": {"max_steps": 60, "epochs": 100, "learning_rate": 0.01},
    }
    run, _ = run_recipe(output=str(tmp_path / "runs" / "my-run"), **settings)
    monkeypatch.chdir(tmp_path)
    merged = lora("merge", run, "--output", "my-model")
    assert merged.code == 0, merged.text
    answered = lora("generate", "runs/my-run", QUESTION, "--max-new-tokens", "20")
    assert answered.code == 0, answered.text
    return answered.out.strip()


def printed(code: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> str:
    changed = code.replace("Qwen/Qwen3-8B", str(tiny_llama)).replace("max_new_tokens=200", "max_new_tokens=20")
    capsys.readouterr()
    exec(compile(changed, "docs/serving.md", "exec"), {})
    return capsys.readouterr().out.strip()


def test_the_blocks_answer_what_lora_answers(served: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]):
    assert served, "something was learned"
    for heading in ("transformers", "PEFT"):
        assert printed(block(heading), tiny_llama, capsys) == served, heading
    prompt = printed(block("Ollama"), tiny_llama, capsys)
    template = re.search(r'TEMPLATE """(.*?)"""', PAGE, re.DOTALL)
    assert template
    # Ollama's own language, of which this uses a loop over turns with two fields alone
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template[1], re.DOTALL)
    assert loop
    turn = loop[1].replace("{{ .Role }}", "user").replace("{{ .Content }}", QUESTION)
    assert (turn + loop[2]).strip() == prompt
