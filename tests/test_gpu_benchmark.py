"""`make gpu` with tiny models on the CPU: every section, from the rows to its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, open_base
from torch.autograd import DeviceType

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


TURING = ("Tesla T4", 14.6, "fp16")  # compute capability 7.5


def test_a_card_without_bf16_gets_fp16_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    named = SimpleNamespace(name="Tesla T4", total_memory=round(14.6 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: named)
    assert gpu.look("cuda") == pytest.approx(TURING)
    monkeypatch.setattr(gpu, "card", lambda: TURING)
    assert {work.dtype for work in gpu.works(tiny=True).values()} == {"fp16"}
    limits = dict(gpu.section_card(gpu.Section("card", tmp_path, tiny=True)))
    assert list(limits) == ["fp16 products", "copies", "dequantizing"]
    folder = gpu.make_model("llama-3b", tmp_path, tiny=True)
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["quantization_config"]["bnb_4bit_compute_dtype"]) == ("float16", "float16")
    assert open_base(folder, "nf4", torch.float16)(input_ids=torch.arange(3, 23)[None]).logits.isfinite().all()


NO_ROOM = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB.": "does not fit: torch.OutOfMemoryError: ",
    "lora_cli.errors.LoraError: error: llama-8b does not fit into the memory of cuda\n  fix: use quantization: nf4": (
        "does not fit: lora_cli.errors.LoraError: error: llama-8b does not fit into the memory of cuda"
    ),
    "KeyError: 'a'": "KeyError: 'a'",
}


def test_what_does_not_fit_says_so_and_the_next_case_follows(tmp_path, monkeypatch):
    said = iter(NO_ROOM)
    failing = lambda *_: subprocess.CompletedProcess([], 1, "", f"out of memory: cut\nTraceback:\n  at\n{next(said)}\n")  # noqa: E731
    monkeypatch.setattr(gpu.Section, "run", failing)
    monkeypatch.setattr(gpu.Section, "model", lambda *_: gpu.make_model("llama-8b", tmp_path, tiny=True))
    gpu.run_section("llama-8b", tmp_path, tmp_path / "results", tiny=True)
    cases = json.loads((tmp_path / "results" / "cpu-tiny-llama-8b.json").read_text())["cases"]
    assert list(cases) == ["64x2", "128x1", "mix"]
    for case, expected in zip(cases.values(), NO_ROOM.values(), strict=True):
        assert case["failed"].startswith(expected)
        assert case["dtype"] == gpu.card()[2]
    assert gpu.why_failed(-9, "step 1")["failed"].startswith("does not fit: the system ended it")


def test_a_card_below_8_gb_looks_for_its_longest_row_in_all_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda: ("GTX 1660", 5.8, "fp16"))
    monkeypatch.setattr(gpu.Section, "case", lambda self, kind, work, *_: {"tokens": 1, "most": work.most_gib})
    found = dict(gpu.section_longest(gpu.Section("longest-full-llama-3b", tmp_path, tiny=False)))
    assert found == {"in all GB": {"tokens": 1, "most": None}}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_section_runs_on_a_cpu(tmp_path):
    few = ("qwen-4b", "llama-8b")  # as with the other shape, for these sections
    found = tiny(
        tmp_path, *(each for each in gpu.SECTIONS if not (each.startswith(("peers", "longest")) and each.endswith(few)))
    )
    failed = {
        f"{name} {case}": each for name, cases in found.items() for case, each in cases.items() if "failed" in each
    }
    assert not failed
    assert found["tests"]["tests"]["exit_code"] == 0
    assert set(found["llama-8b"]) == {"64x2", "128x1", "mix"}
    for case in (*found["llama-8b"].values(), *found["modes"].values(), *found["fused"].values()):
        assert "missing" not in case
        assert case["tokens_per_second"] > 0
        assert case["share_of_product_limit"] > 0
        assert sum(case["parts"].values()) == pytest.approx(1)
    for name, case in found["peers-llama-3b"].items():
        if name.endswith("trl"):
            ours = found["peers-llama-3b"][name.removesuffix("trl") + "lora"]
            assert case["losses"] == pytest.approx(ours["losses"], rel=0.01), "the same rows, base and initial A"
    for mode in ("full", "offload"):
        assert all(each["tokens"] >= 256 for each in found[f"longest-{mode}-llama-3b"].values())


def test_attention_is_not_taken_for_matrix_products():
    """Names of kernels on a GPU; those of attention name cutlass's types."""
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4, cutlass::bfloat16_t>>"
    names = {
        flash: "attention",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "matrix products",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "dequantizing",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, BinaryFunctor>": "elementwise work, reductions and the rest",
    }
    events = [SimpleNamespace(key=name, device_type=DeviceType.CUDA, self_device_time_total=1.0) for name in names]
    parts = gpu.by_part(SimpleNamespace(key_averages=lambda: events), "cuda")
    assert parts == pytest.approx(dict.fromkeys(names.values(), 1 / 6))


def test_a_section_that_fails_keeps_what_it_found_and_takes_no_other_with_it(tmp_path, monkeypatch):
    def failing(_: Any) -> Any:
        yield "first", {"tokens_per_second": 1.0}
        raise RuntimeError("the card is gone")

    monkeypatch.setitem(gpu.SECTIONS, "fused", failing)
    with pytest.raises(RuntimeError, match="gone"):
        gpu.run_section("fused", tmp_path, tmp_path / "results", tiny=True)
    found = json.loads((tmp_path / "results" / "cpu-tiny-fused.json").read_text())
    assert found["cases"] == {"first": {"tokens_per_second": 1.0}}
