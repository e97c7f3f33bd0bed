"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import losses

pytestmark = pytest.mark.gpu
NO_BF16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
needs_bf16 = pytest.mark.skipif(NO_BF16, reason="this GPU has no bf16")
NO_LIGER = importlib.util.find_spec("liger_kernel") is None


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=needs_bf16), "fp16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_training_on_a_gpu_follows_the_cpu(run_recipe, tmp_path, quantization, dtype):
    """fp16 goes through loss scaling. Half precision keeps three digits: four steps stay within a few hundredths."""
    settings = {"quantization": quantization}
    cpu, _ = run_recipe(**settings, device="cpu", dtype="fp32", output=str(tmp_path / "cpu"))
    gpu, report = run_recipe(**settings, device="cuda", dtype=dtype, output=str(tmp_path / "gpu"))
    assert losses(gpu) == pytest.approx(losses(cpu), abs=0.05)
    assert 0 < report["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_follow_the_plain_ones(run_recipe, tmp_path, optimizer):
    plain, _ = run_recipe(device="cuda", train={"optimizer": "adamw"}, output=str(tmp_path / "plain"))
    paged, _ = run_recipe(device="cuda", train={"optimizer": optimizer}, output=str(tmp_path / "paged"))
    assert losses(paged) == pytest.approx(losses(plain), abs=0.05)


def test_packing_is_exact_on_a_gpu(run_recipe, tmp_path):
    """E4 there: one packed row at a time, or eight side by side."""
    curves = []
    for micro, accumulated in [(8, 1), (1, 8)]:
        run, _ = run_recipe(
            device="cuda",
            train={"micro_batch_size": micro, "gradient_accumulation_steps": accumulated},
            output=str(tmp_path / f"run-{micro}"),
        )
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@needs_bf16
@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_variable_length_attention_is_attention_example_by_example(window, kv_heads, monkeypatch):
    """Forward and gradients, in bf16: the kernel rounds in another order."""
    from lora_cli.base import attention

    device = torch.device("cuda")
    lengths = [5, 1, 33, 64]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, sum(lengths), 64, generator=generator) for heads in (4, kv_heads, kv_heads)]
    inputs = attention.packed_inputs(lengths, device)

    def run() -> list[torch.Tensor]:
        q, k, v = (x.to(device, torch.bfloat16).requires_grad_() for x in made)
        ends, longest = inputs["cu_seq_lens_q"], inputs["max_length_q"]
        module = torch.nn.Module()
        out, _ = attention.per_example_attention(module, q, k, v, None, 0.0, None, ends, window, max_length_q=longest)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in (q, k, v))]

    assert attention.varlen_fits(device, torch.bfloat16, 64)
    ours = run()
    monkeypatch.setattr(attention, "varlen_fits", lambda *_: False)
    for found, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "train",
    [
        {"gradient_checkpointing": "selective", "activation_memory": 1e-6},
        {"gradient_checkpointing": "offload"},
        {"compile": True},
        pytest.param({"liger_kernel": True}, marks=pytest.mark.skipif(NO_LIGER, reason="liger-kernel is missing")),
    ],
    ids=["selective", "offload", "compile", "liger"],
)
def test_what_saves_memory_changes_nothing(run_recipe, tmp_path, train):
    plain, _ = run_recipe(device="cuda", adapter={"dropout": 0.2}, output=str(tmp_path / "plain"))
    other, _ = run_recipe(device="cuda", adapter={"dropout": 0.2}, train=train, output=str(tmp_path / "other"))
    assert losses(other) == pytest.approx(losses(plain), abs=1e-4)


def test_auto_fits_into_what_a_process_may_take(run_recipe, tmp_path, monkeypatch):
    """A real allocation error: the driver gives this process little more than the model holds."""
    rows = {"batch_size": 24, "micro_batch_size": "auto"}
    plain, _ = run_recipe(device="cuda", train=rows, output=str(tmp_path / "plain"))
    held, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    free = lambda *_: (held + 2**20 - torch.cuda.memory_reserved(), total)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)  # a run sets its own share, to what is free
    try:
        tight, _ = run_recipe(device="cuda", train=rows, output=str(tmp_path / "tight"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert losses(tight) == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each process")
@needs_bf16
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_in_shares_on_two_gpus_is_the_base_on_one(run_recipe, recipe_file, tmp_path, quantization):
    """Loaded on the CPU and spread; quantized there, so that a rare weight may round to the neighbouring NF4 value."""
    settings = {"quantization": quantization, "device": "cuda", "dtype": "bf16", "adapter": {"dropout": 0.2}}
    steps = {"gradient_accumulation_steps": 5, "micro_batch_size": 1}
    alone, one = run_recipe(**settings, train=steps, output=str(tmp_path / "alone"))
    recipe = recipe_file(**settings, train=steps | {"shard_base": True}, output=str(tmp_path / "shares"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "lora_cli", "train", str(recipe)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "each of 2 processes holds" in done.stderr
    assert losses(tmp_path / "shares") == pytest.approx(losses(alone), abs=0.05)
    assert json.loads((tmp_path / "shares" / "report.json").read_text())["learned"] == one["learned"]
