"""`lora selftest`: every equality on a tiny model, and what is said when one does not hold."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_gguf import write_gguf

from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.several import Several
from lora_cli.base import attention
from lora_cli.data import batches
from lora_cli.studies import equalities, selftest


def test_every_equality_holds_here(lora: Any):
    """In the design's order; llama.cpp, which E14 is about, is no part of this environment."""
    said = json.loads(lora("selftest", "--json").out)
    measured = [each for each in said["equalities"] if each["name"] != "E14"]
    assert [each["name"] for each in measured if each["holds"] is not True] == []
    assert all(0 <= each["difference"] <= each["bound"] for each in measured)
    (in_llama_cpp,) = (each for each in said["equalities"] if each["name"] == "E14")
    assert in_llama_cpp["why"].startswith("needs xllamacpp")
    named = re.findall(r"\| (E\d+) \|", (ROOT / "docs" / "design.md").read_text())
    assert list(dict.fromkeys(each["name"] for each in said["equalities"])) == named
    assert said["ok"]


def row_weights_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Several.use
    monkeypatch.setattr(Several, "use", lambda self, rows: real(self, [*rows[1:], rows[0]]))


def reverse_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LoRALinear, "delta_weight", lambda self, rows: -self.scaling * (self.lora_B[rows] @ self.lora_A)
    )


def scale_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoRALinear.__init__

    def wrong(self: Any, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        self.scaling *= 2

    monkeypatch.setattr(LoRALinear, "__init__", wrong)


def let_examples_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "packed_inputs", lambda each, device: attention.packed_inputs([sum(each)], device))


@pytest.mark.parametrize(
    ("spoil", "names", "suspects"),
    [
        (scale_twice, {"E2"}, "torch, peft"),
        (let_examples_see_each_other, {"E3", "E6"}, "transformers, torch"),
        (row_weights_shifted, {"E13"}, "transformers, torch"),
        (reverse_update, {"E8"}, "transformers, safetensors, bitsandbytes"),
    ],
)
def test_a_broken_equality_is_named_with_the_versions_to_suspect(spoil, names, suspects, lora, monkeypatch):
    kept = [each for each in selftest.EQUALITIES if each.name in {"E1", *names} and "no run" not in each.says]
    monkeypatch.setattr(selftest, "EQUALITIES", kept)
    spoil(monkeypatch)
    said = lora("selftest")
    assert said.code == 3
    assert {line.split()[0] for line in said.error.splitlines() if "BROKEN" in line} == names
    assert re.sub(r" [\d.]+(\+\w+)?(?=[,:])", "", said.error.split("fix: suspect ")[1]).split(":")[0] == suspects
    assert f"torch {torch.__version__}" in said.error
    assert re.search(r"(?<!\w)/\w+/", said.error) is None, "no paths"


def test_without_a_library_an_equality_is_not_run_and_nothing_is_wrong(lora: Any, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else real(name, *more))
    kept = [each for each in selftest.EQUALITIES if each.name in ("E2", "E12")]
    monkeypatch.setattr(selftest, "EQUALITIES", kept)
    said = lora("selftest")
    assert said.code == 0
    lines = [line for line in said.out.splitlines() if line.startswith("E2 ")]
    assert [line.endswith("not run: needs peft") for line in lines] == [False, True]
    assert "peft" not in said.out.splitlines()[1]


def test_a_model_that_does_not_fit_is_no_broken_equality(tiny_gpt2, lora, monkeypatch, tmp_path):
    """GPT-2's layers are transposed, its weights in bf16; without a chat template E15 has nothing to look at."""
    shutil.copytree(tiny_gpt2, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "chat_template.jinja").unlink()
    kept = [each for each in selftest.EQUALITIES if each.name in ("E1", "E3", "E9", "E15")]
    monkeypatch.setattr(selftest, "EQUALITIES", kept)
    said = lora("selftest", "--model", tmp_path / "gpt2")
    assert said.code == 0, said.text
    assert said.out.splitlines()[-1].endswith("not run: the model has no chat template")
    assert "model: gpt2" in said.out


@pytest.mark.parametrize("name", ["E4", "E7"])
def test_ctrl_c_within_a_training_ends_it(name, lora, monkeypatch):
    """E7 stops runs itself, by the clock."""
    train = equalities.train

    def interrupted(*given: Any, **how: Any) -> Any:
        return train(*given, **how, before_step=lambda run: signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(equalities, "train", interrupted)
    kept = [each for each in selftest.EQUALITIES if each.name in (name, "E15")]
    monkeypatch.setattr(selftest, "EQUALITIES", kept)
    said = lora("selftest")
    assert said.code == 130
    assert said.text.strip().endswith("stopped")
    assert "do not hold" not in said.text


def test_a_gguf_file_is_measured_but_where_transformers_would_open_it(tiny_llama, lora, monkeypatch, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    kept = [each for each in selftest.EQUALITIES if each.name in ("E1", "E5", "E8", "E9")]
    monkeypatch.setattr(selftest, "EQUALITIES", kept)
    said = json.loads(lora("selftest", "--model", path, "--json").out)
    theirs = "of a GGUF file, transformers makes another model"
    assert {each["says"] for each in said["equalities"] if each["why"] == theirs} == {
        "loss in chunks = transformers' loss",
        "PEFT reads ours",
        "we read PEFT's",
    }
    held = [each["says"] for each in said["equalities"] if each["holds"]]
    assert held == ["a fresh adapter changes nothing", "recomputed activations = kept ones", "merged = base + adapter"]


def test_apart_sees_what_is_no_number_or_has_another_shape():
    one = torch.tensor([1.0, -4.0])
    assert equalities.apart([one], [one]) == 0
    assert equalities.apart([one], [torch.tensor([1.0, -4.1])]) == pytest.approx(0.1 / 4.1, rel=1e-5)
    assert equalities.apart([one * torch.nan], [one]) == float("inf")
    assert equalities.apart([one[:1]], [one]) == float("inf")
    assert equalities.apart([one], [one * 0]) == 4


def test_a_model_named_from_here_is_measured_in_recipes_elsewhere_and_a_run_need_not_help(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_llama.parent)
    monkeypatch.setattr(selftest, "EQUALITIES", [each for each in selftest.EQUALITIES if each.name == "E7"])
    (measured,) = selftest.selftest(tiny_llama.name, lambda _: nullcontext())["equalities"]
    assert measured["holds"], measured["why"]
    bench = selftest.Bench(str(tiny_llama), tmp_path)
    assert equalities.evaluated(bench, train={"learning_rate": 1e-12}) == 0
