"""Liger's kernels in place of a model's own code: same values, same gradients, and only where a trial shows it.

By a stand-in that computes in torch and overwrites what Liger overwrites; and, in the slow tier, by Liger itself in
Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import ROOT, assert_near, losses
from environments import environment
from test_recompute import MODELS, TINY, run, tiny, with_random_weight
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lora_cli.base import liger
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.surgery import forward_layers
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.training import resume
from lora_cli.training.opening import open_device

KERNELS = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "stand-in"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no packages for this system")
def test_all_of_this_in_tritons_interpreter():
    """In a process of its own: Triton asks for its interpreter once, when it is imported."""
    packages = ("--no-deps", "triton==3.9.0", f"liger-kernel=={liger.VERSION}")
    command = [environment("liger", *packages), "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    searched = os.pathsep.join(map(str, (ROOT, sysconfig.get_path("purelib"))))  # for all but these two
    interpreted = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": searched}
    done = subprocess.run(
        [*command, "-k", "interpreter and not tritons"], env=interpreted, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "failed" not in done.stdout
    assert "passed" in done.stdout


@pytest.fixture(params=[KERNELS])
def kernels(request, monkeypatch) -> Any:
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    if request.param == "interpreter":
        complete_interpreter(monkeypatch)
    else:
        own = resume.version
        monkeypatch.setattr(resume, "version", lambda name: name if "liger" in name else own(name))
        for name, functions in stand_in().items():
            module = ModuleType(name)
            vars(module).update(functions)
            monkeypatch.setitem(sys.modules, name, module)


def complete_interpreter(monkeypatch: Any) -> None:
    """What Triton's interpreter lacks in 3.9: types of Python's floats, bf16, functions of a device's own library."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert, builder = interpreter._implicit_cvt, interpreter.InterpreterBuilder
    binary, cast = builder.binary_op, builder.cast_impl

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    def rounded(self: Any, source: Any, to: Any) -> Any:
        """To the nearest bf16, as devices do it, where the interpreter cuts the other bits off."""
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data, np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    def with_bf16(self: Any, left: Any, right: Any, operation: Any) -> Any:
        """Its numbers are held as uint16, and would be added and multiplied as such."""
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        wide = (self.cast_impl(each, tl.float32) for each in (left, right))
        return self.cast_impl(binary(self, *wide, operation), tl.bfloat16)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(builder, "binary_op", with_bf16)
    monkeypatch.setattr(builder, "cast_impl", rounded)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def stand_in() -> dict[str, dict[str, Any]]:
    """The functions that are used, in torch. What Liger overwrites is overwritten, without autograd knowing."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def compute(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
            wide = x.float()
            normalized = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
            if casting == "llama":
                return (normalized.to(x.dtype) * (offset + weight)).to(x.dtype)
            return (normalized * (offset + weight.float())).to(x.dtype)

        @staticmethod
        def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
            ctx.save_for_backward(x)
            ctx.how = how
            return Norm.compute(x, *how[:4])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            with torch.enable_grad():
                leaf = ctx.saved_tensors[0].detach().requires_grad_()
                (dx,) = torch.autograd.grad(Norm.compute(leaf, *ctx.how[:4]), leaf, grad)
            if ctx.how[4]:
                grad.data.copy_(dx)
            return dx, *(None,) * 6

    def product_of(activation: Any) -> Any:
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
                ctx.save_for_backward(gate, up)
                return activation(gate) * up

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                gate, up = ctx.saved_tensors
                with torch.enable_grad():
                    leaves = [each.detach().clone().requires_grad_() for each in (gate, up)]
                    grads = torch.autograd.grad(activation(leaves[0]) * leaves[1], leaves, grad)
                gate.data.copy_(grads[0])
                up.data.copy_(grads[1])
                return gate, up

        return Product

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        for x in (q, k):
            half = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
            x.data.copy_(x * cos.unsqueeze(1) + half * sin.unsqueeze(1))
        return q, k, cos, sin

    functions: dict[str, dict[str, Any]] = {
        "rms_norm": {"LigerRMSNormFunction": Norm},
        "swiglu": {"LigerSiLUMulFunction": product_of(F.silu)},
        "geglu": {"LigerGELUMulFunction": product_of(lambda x: F.gelu(x, approximate="tanh"))},
        "rope": {"rope_forward": rotate, "rope_backward": lambda q, k, cos, sin: rotate(q, k, cos, -sin)[:2]},
    }
    packages: dict[str, dict[str, Any]] = {"liger_kernel": {"__path__": []}, "liger_kernel.ops": {"__path__": []}}
    return packages | {f"liger_kernel.ops.{name}": each for name, each in functions.items()}


# ── modules ─────────────────────────────────────────────────────────────────────────────────────────────────────


def values_and_gradients(call: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = call(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm(kernels, kind, dtype):
    """Llama rounds before the weight, Gemma after it; in bf16 the nearer of Liger's two orders is taken."""
    norm = with_random_weight(kind(48)).to(dtype)
    x = torch.randn(2, 5, 48).to(dtype)
    expected = values_and_gradients(norm, x)
    offset, casting = liger._norm(norm).args[1:]
    assert offset == (0.0 if kind is LlamaRMSNorm else 1.0)
    assert dtype == torch.float32 or casting == ("llama" if kind is LlamaRMSNorm else "gemma")
    forward = liger._norm_forward(norm, offset, casting, norm.forward)
    near(values_and_gradients(forward, x), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_mlp(kernels, activation, dtype):
    mlp = LlamaMLP(hf.LlamaConfig(**TINY, hidden_act=activation)).to(dtype).requires_grad_(False)
    x = torch.randn(2, 5, 32).to(dtype)
    expected = values_and_gradients(mlp, x)
    near(values_and_gradients(liger._gated(mlp, liger.is_gated(mlp))(mlp.forward), x), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rotary_embedding(kernels, dtype):
    q, k = (torch.randn(2, 7, heads, 8).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, 7, 4).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    own = hf.models.llama.modeling_llama.apply_rotary_pos_emb
    both = [(own, (cos, sin)), (liger._Rotary.apply, (cos, sin))]
    found = [values_and_gradients(lambda q, k, f=f, a=a: torch.cat(f(q, k, *a), 1), q, k) for f, a in both]
    near(found[1], found[0], dtype)
    before = q.clone()
    liger._Rotary.apply(q, k, cos, sin)
    assert torch.equal(q, before), "it belongs to whoever made it"


def near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """In bf16 to its last bit or two: 2⁻⁸ is the rounding of one number, and there are up to four in a row."""
    limit = 1e-5 if dtype == torch.float32 else 2**-6
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == wanted.dtype == dtype
        assert (actual.float() - wanted.float()).abs().max() <= limit * wanted.float().abs().max()


def test_what_only_looks_like_it_is_left_alone(kernels):
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 1.01 * super().forward(hidden_states)

    class ScaledMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

    exact = LlamaMLP(hf.LlamaConfig(**TINY, hidden_act="gelu"))  # Liger's is the approximation by tanh
    for module in (exact, ScaledMLP(hf.LlamaConfig(**TINY))):
        assert liger._gated(module, liger.is_gated(module)) is None
    assert liger._norm(with_random_weight(OtherRMSNorm(16))) is None


# ── whole models ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("llama", (5, 2, 2)),
        ("gemma2", (9, 2, 2)),  # norms before the residual sums, whose gradient is that of their output
        ("qwen3", (9, 2, 2)),
        ("phi3", (5, 0, 2)),  # gate and up are one layer
        ("cohere", (0, 2, 0)),  # its norms subtract the mean, its rotary embedding pairs neighbours
    ],
)
def test_same_values_same_gradients_nothing_more_kept(kernels, name, replaced):
    """With the adapters' hooks, and layers that make their inputs again from what Liger overwrites later."""
    model = tiny(MODELS[name][0]())
    logits, gradients, _ = run(model)
    assert tuple(liger.use_liger(model).values()) == replaced
    save_only_inputs(model)
    assert sum(forward_layers(module) == ("kernel",) for module in model.modules()) == sum(replaced)
    after, again, less = run(model)
    assert_near([after, *again], [logits, *gradients], 1e-5)  # fp32: sums in another order
    plain = tiny(MODELS[name][0]())
    save_only_inputs(plain)
    statistics = 40 * 4 * 9 * 2 * 4  # of tokens, norms a block, blocks, bytes; with heads, of which there are four
    assert less <= run(plain)[2] + statistics
    model.eval()
    with torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.equal(model(input_ids=ids).logits, plain.eval()(input_ids=ids).logits), "not the model's own code"


def test_a_model_without_any_of_it_is_refused(kernels, run_recipe, tiny_gpt2):
    with pytest.raises(LoraError, match="nothing in GPT2LMHeadModel is what one of Liger's kernels computes"):
        run_recipe(base_model=str(tiny_gpt2), device="cpu", train={"liger_kernel": True})


@pytest.mark.parametrize("mode", ["none", "full", "selective", "offload"])
def test_training_is_the_same_in_every_mode_of_checkpointing(kernels, run_recipe, tmp_path, mode):
    train = {"gradient_checkpointing": mode, "max_steps": 2}
    train |= {"activation_memory": 1e-6} if mode == "selective" else {}
    settings: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}
    found = []
    for used in (False, True):
        settings |= {"train": train | {"liger_kernel": used}, "output": str(tmp_path / f"run-{used}")}
        found.append(losses(run_recipe(**settings)[0]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_gpu_or_without_liger_it_is_refused_before_data_are_prepared(recipe_file, monkeypatch):
    recipe = load_recipe(recipe_file(train={"liger_kernel": True}, device="cpu"))
    with pytest.raises(LoraError, match="need a CUDA or ROCm GPU, and this run is on cpu"):
        open_device(recipe)
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(LoraError, match="cannot be imported") as caught:
        open_device(recipe)
    assert f"pip install liger-kernel=={liger.VERSION}" in str(caught.value.fix)


def test_another_version_of_it_is_another_run():
    began = dict.fromkeys([*resume.COMPUTING, "base_fingerprint", "dtype", "search", "data_fingerprint"], "same")
    now = began | {"liger-kernel": "0.8.5"}
    assert resume.changes_of_environment(now, now) == []
    (change,) = resume.changes_of_environment(now | {"liger-kernel": "0.8.4"}, now)
    assert change == ("versions", "version of liger-kernel: 0.8.4 → 0.8.5")
    assert resume.changes_of_environment(began, began | {"liger-kernel": None}) == [], "a run of before it existed"


def test_a_norm_whose_input_has_another_dtype_than_its_weight_stays_its_own(kernels):
    norm = with_random_weight(LlamaRMSNorm(16))
    liger_norm = liger._norm(norm)(norm.forward)
    x = torch.randn(3, 16).to(torch.bfloat16).requires_grad_()  # whose result is fp32; Liger's would be bf16
    assert torch.equal(liger_norm(x), norm(x))
