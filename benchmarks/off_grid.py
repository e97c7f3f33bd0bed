"""A model that was stored in 4 bits lies on a grid: quantizing it again flatters one kind and damns another. This moves
it off the grid without changing what it computes.

    python benchmarks/off_grid.py SOURCE TARGET [--spread 0.1] [--seed 0]

Channels are scaled by exp(N(0, spread)), and the next layer takes the factors back: norm → q, k, v and norm → gate, up
by input channel, v → o and up → down by output channel. For models that are built as Llama is (SmolLM2, Mistral, Qwen 2
and 3). Exact in real numbers; stored in bf16 it differs by rounding, as every model that is stored so does.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def move_off_grid(source: Path, target: Path, *, spread: float = 0.1, seed: int = 0) -> None:
    """Write the model to `target` in bf16. Prints the largest difference of its logits, in fp32, before that."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    draw, ids = torch.Generator().manual_seed(seed), torch.arange(100, 132)[None]

    def factors(number: int) -> Tensor:
        return torch.exp(spread * torch.randn(number, generator=draw))

    with torch.no_grad():
        before = model(ids).logits
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, layers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                scale = factors(norm.weight.numel())
                norm.weight.mul_(scale)
                for layer in layers:
                    layer.weight.div_(scale)
            scale = factors(attention.v_proj.out_features)
            heads, shared = model.config.num_key_value_heads, model.config.num_attention_heads
            attention.v_proj.weight.mul_(scale[:, None])
            if attention.v_proj.bias is not None:
                attention.v_proj.bias.mul_(scale)
            attention.o_proj.weight.div_(scale.view(heads, -1).repeat_interleave(shared // heads, 0).reshape(-1))
            scale = factors(mlp.up_proj.out_features)
            mlp.up_proj.weight.mul_(scale[:, None])
            mlp.down_proj.weight.div_(scale)
        print(f"largest difference of logits in fp32: {(model(ids).logits - before).abs().max():.1e}")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.bfloat16().save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    move_off_grid(given.source, given.target, spread=given.spread, seed=given.seed)
