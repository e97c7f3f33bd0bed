"""The model cards: what they say is what the report and the run say, and nothing of the machine is in them."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import quiet_console

from lora_cli.adapters.card import CARD, measured_of, model_card
from lora_cli.adapters.file import FILES, SAVED
from lora_cli.base.source import BaseSource
from lora_cli.merging.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.training.checkpoint import FILES as CHECKPOINT_FILES
from lora_cli.training.train import train
from lora_cli.training.verdict import judge

LEARNS: dict[str, Any] = {
    "data": {"validation": 0.25},
    "train": {"learning_rate": 0.01, "max_steps": 8, "eval_every": 4, "checkpoint_every": 4},
}


def head(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_the_report_says_and_names_no_place(run_recipe, tmp_path):
    run, report = run_recipe(**LEARNS)
    text = (run / "adapter" / CARD).read_text()
    verdict = judge(json.loads((run / "report.json").read_text()))
    assert measured_of(run / "adapter")[:2] == [verdict.headline, verdict.why]
    assert f"{report['trained_parameters']:,}" in text
    assert "without a chat template" in text
    assert head(text)["library_name"] == "peft"
    assert "base_model" not in head(text), "a folder is not a name on the hub"
    for private in (str(tmp_path), str(Path.home()), platform.node(), str(report["seconds"])):
        assert private not in text
    assert not re.search(r"\d:\d\d", text), "a time"
    assert CARD in FILES
    assert CARD not in SAVED


def test_no_checkpoint_holds_it_and_a_longer_run_has_a_new_one(run_recipe):
    run, _ = run_recipe(**LEARNS)
    assert CARD not in str(CHECKPOINT_FILES)
    assert not list((run / "checkpoints").rglob(CARD))
    before = (run / "adapter" / CARD).read_text()
    (run / "adapter" / CARD).write_text("an old one\n")
    longer = load_recipe(run / "recipe.yaml", ["train.max_steps=12"])
    train(longer, quiet_console(), resume=True, allow=["train.max_steps"])
    assert not list((run / "checkpoints").rglob(CARD)), "a checkpoint's bytes are those of a run without a card"
    after = (run / "adapter" / CARD).read_text()
    assert "| 12, " in after
    assert "| 8, " in before


def test_the_merged_folder_repeats_what_was_measured(run_recipe, tmp_path):
    run, _ = run_recipe(**LEARNS)
    merge(run, tmp_path / "merged")
    text = (tmp_path / "merged" / CARD).read_text()
    for point in measured_of(run / "adapter"):
        assert f"- {point}\n" in text
    assert "keeps 100.00% of the adapter's effect" in text
    assert head(text)["library_name"] == "transformers"
    assert str(tmp_path) not in text


def test_a_base_of_the_hub_is_named_with_its_revision(tmp_path):
    base = BaseSource("Qwen/Qwen3-8B", tmp_path, "0123abc")
    text = model_card(base, library="peft", relation="adapter", said=["It learned."], settings={}, use="pass")
    assert head(text) == {
        "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "(revision 0123abc)" in text


@pytest.mark.parametrize("found", [None, b"", b"# Mine\n", b"\xff\xfe", b"## What was measured\n\nnothing\n"])
def test_another_readme_is_not_repeated(found: bytes | None, tmp_path):
    if found is not None:
        (tmp_path / CARD).write_bytes(found)
    assert measured_of(tmp_path) == []
