"""`make gpu` with tiny models on the CPU: every section, from the rows to its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, open_base

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu


def tiny(folder: Path, *sections: str) -> dict[str, dict[str, Any]]:
    """Results of sections, each case by its name."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", *sections]
    command += ["--out", str(folder / "results"), "--models", str(folder / "models")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = {section: (folder / "results" / f"cpu-tiny-{section}.json").read_text() for section in sections}
    for section in sections:
        assert f"# cpu: {section}" in (folder / "results" / f"cpu-tiny-{section}.md").read_text()
    return {section: json.loads(text)["cases"] for section, text in read.items()}


def test_a_made_model_is_one_that_training_opens(tmp_path):
    model = open_base(gpu.make_model("qwen-4b", tmp_path, tiny=True), "nf4", torch.bfloat16)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == "Linear4bit"
    ids = torch.arange(3, 23)[None]
    assert model(input_ids=ids).logits.isfinite().all()
    assert model.model.layers[0].input_layernorm.weight.eq(1).all()


def test_words_have_the_lengths_that_were_drawn(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpu.make_model("llama-3b", tmp_path, tiny=True))
    for rows in (gpu.words(lambda _: 33, 3, tokenizer), gpu.words(lambda draw: draw.randrange(8, 20), 5, tokenizer)):
        lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
        assert lengths[:3] == [33] * 3 or all(8 <= length < 20 for length in lengths)


def test_the_page_shows_what_failed_and_each_part():
    cases = {
        "a": {"peak_bytes": 2**31, "tokens_per_second": 1234.5, "parts": {"attention": 0.25}, "losses": [1.0]},
        "b": {"failed": "no | memory"},
    }
    page = gpu.page({"card": "A", "section": "modes", "versions": {"torch": "2.11"}, "cases": cases})
    assert "| case | peak, GiB | tokens per second | failed |" in page
    assert "| a | 2 | 1,234 |  |" in page
    assert "| b |  |  | no / memory |" in page
    assert "a, the time by part: attention 25.0%" in page


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_section_runs_on_a_cpu(tmp_path):
    found = tiny(tmp_path, *gpu.SECTIONS)
    failed = {
        f"{name} {case}": each for name, cases in found.items() for case, each in cases.items() if "failed" in each
    }
    assert not failed
    assert found["tests"]["tests"]["exit_code"] == 0
    assert set(found["llama-8b"]) == {"64x2", "128x1", "mix"}
    for case in (*found["llama-8b"].values(), *found["modes"].values()):
        assert case["tokens_per_second"] > 0
        assert case["share_of_product_limit"] > 0
        assert sum(case["parts"].values()) == pytest.approx(1)
    for name, case in found["peers"].items():
        if name.endswith("trl"):
            ours = found["peers"][name.removesuffix("trl") + "lora"]
            assert case["losses"] == pytest.approx(ours["losses"], rel=0.01), "the same rows, base and initial A"
    assert all(each["tokens"] >= 256 for each in found["longest"].values())
