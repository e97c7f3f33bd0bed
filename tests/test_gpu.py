"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import pytest
import torch
from conftest import losses

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
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
