"""torch.compile for the blocks: one graph each where a GPU trains, and what it does not say by itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import open_base, randomize_adapter
from torch.nn import functional as F

from lora_cli.adapters.attach import attach
from lora_cli.adapters.kinds import KINDS
from lora_cli.adapters.targets import block_lists, find_targets
from lora_cli.adapters.trained import cast_once, dropout_keys
from lora_cli.base import attention
from lora_cli.base.compiled import compile_blocks, say_when_dynamo_gives_up


def in_one_graph(q, k, v, ends, _, longest, __, *, scale, window_size, enable_gqa):
    """Variable-length attention's contract in operations that can be compiled, for the kernel that only GPUs have."""
    at = torch.arange(q.shape[0])
    example = torch.searchsorted(ends, at, right=True)
    sees = (example[:, None] == example[None]) & (at[:, None] >= at[None])
    assert window_size == (-1, 0)
    rows = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(*rows, sees, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Blocks are compiled as for a GPU: with its kernel's stand-in, whole, and counted; without compiling kernels."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(attention, "varlen_attn", in_one_graph)
    monkeypatch.setattr(attention, "varlen_fits", lambda *_: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # dynamo looks at things in ways that warn
@pytest.mark.parametrize(
    ("method", "quantization", "dropout"),
    [
        pytest.param("lora", "none", 0.0, marks=pytest.mark.slow),
        ("lora", "nf4", 0.2),
        pytest.param("qa_lora", "int4", 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_block_is_one_graph_for_all_lengths_of_packed_examples(
    tiny_llama, as_on_a_gpu, tmp_path, monkeypatch, method, quantization, dropout
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = open_base(tiny_llama, quantization)
    targets = find_targets(model, "all-linear", rank=4, alpha=8.0)
    layers = attach(model, [replace(each, kind=KINDS[method]) for each in targets])
    randomize_adapter(model)
    for layer in layers.values():
        layer.dropout = dropout
    model.train()

    def step(lengths: list[int]) -> list[torch.Tensor]:
        drawn = torch.Generator().manual_seed(len(lengths))
        tokens = sum(lengths)
        keys = torch.randint(-(2**31), 2**31, (tokens,), generator=drawn).int() | 1
        ids = torch.randint(512, (1, tokens), generator=drawn)
        with dropout_keys(layers, keys if dropout else None), cast_once(layers, model.dtype):
            logits = model(input_ids=ids, **attention.packed_inputs(lengths, torch.device("cpu"))).logits
            logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [logits.detach(), *gradients]

    steps = ([7, 40, 5, 5, 6], [20, 9, 3], [64, 80])
    plain = [step(lengths) for lengths in steps]
    compile_blocks(
        [each for name in block_lists(model) for each in model.get_submodule(name)], torch.device("cuda"), print
    )
    for lengths, expected in zip(steps, plain, strict=True):
        for actual, right in zip(step(lengths), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-6)
    assert len(as_on_a_gpu) == 2, "one for the first block, whose input needs no gradient, and one for all others"


def test_a_part_that_torch_gives_up_compiling_is_said_once():
    """It is logged where nobody reads it, and the run is slower than it was promised to be."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    before = logger.handlers, logger.propagate, logger.level
    said: list[str] = []
    say_when_dynamo_gives_up(said.append)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):  # type: ignore[attr-defined]
            compiled = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
            for factor in (1, 2, 3, 4):
                assert compiled(torch.ones(2), factor).tolist() == [factor, factor]
    finally:
        logger.handlers, logger.propagate, logger.level = before
        torch._dynamo.reset()
    assert len(said) == 1
    assert "gave up" in said[0]
