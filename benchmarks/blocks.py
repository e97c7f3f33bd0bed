"""What one transformer block costs beside its matrix products: bytes kept for the backward pass, and kernels launched.

    python benchmarks/blocks.py [SECTION ...] [--json FILE]

kept   bytes that autograd keeps of a token in one block, for ten architectures and two shapes of real models: as it
       was when inputs of adapted layers were saved, as it is now that they are made again, and PEFT's layers as TRL
       trains them (A and B in bf16; what TRL does by itself is outside of the blocks)
launches  operations of a forward and a backward pass in one block that a GPU would launch a kernel for, counted by the
       profiler: those that call no other and neither allocate nor view. Attention is one operation, as the GPU's kernel
       for packed rows is: a stand-in takes its place. A and B are cast once a step, which does not count. Each layer
       by itself, then joined as training does

Work: random models of two blocks in bf16, rank 16 on every linear layer, 256 tokens, attention by SDPA if there is one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf

TOKENS, RANK = 256, 16
IDS: dict[str, Any] = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_hidden_layers": 2,
}
FULL: dict[str, Any] = IDS | {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SMALL: dict[str, Any] = FULL | {"num_key_value_heads": 2}
LLAMA_8B: dict[str, Any] = IDS | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_4B: dict[str, Any] = LLAMA_8B | {"hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "mistral": lambda: hf.MistralConfig(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=64),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=64),
    "granite": lambda: hf.GraniteConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "cohere": lambda: hf.CohereConfig(**SMALL),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**FULL),
    "gpt2": lambda: hf.GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=512),
    "Llama-3.1-8B": lambda: hf.LlamaConfig(**LLAMA_8B),
    "Qwen3-4B": lambda: hf.Qwen3Config(**QWEN3_4B),
}


def base(name: str) -> Any:
    from lora_cli.base.attention import attention_implementation
    from lora_cli.base.load import quiet_libraries

    quiet_libraries()
    config = CONFIGS[name]()
    for key in [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]:
        setattr(config, key, 0.0)
    how = attention_implementation(config)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=how)


def ours(name: str) -> tuple[Any, Callable[[], Any]]:
    """(a model ready to train, a call that gives its loss)."""
    from lora_cli.adapters.attach import attach
    from lora_cli.adapters.targets import find_targets
    from lora_cli.base.recompute import save_only_inputs
    from lora_cli.data.batches import collate
    from lora_cli.data.example import Example
    from lora_cli.evaluation.loss import summed_loss

    model = base(name)
    layers = attach(model, find_targets(model, "all-linear", rank=RANK, alpha=RANK))
    save_only_inputs(model)
    example = Example(np.arange(TOKENS), [(1, TOKENS, 1.0)])
    batch = collate([example], packed=True, pad_id=0, device=torch.device("cpu"))

    for each in layers.values():
        each.hold_cast(model.dtype)
    return model.train(), lambda: summed_loss(model, batch)


def peft(name: str) -> tuple[Any, Callable[[], Any]]:
    from peft import LoraConfig, get_peft_model

    settings: Any = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = base(name)
    model.set_attn_implementation("sdpa")
    get_peft_model(model, LoraConfig(**settings)).to(torch.bfloat16)
    ids = torch.arange(TOKENS)[None]
    return model.train(), lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


@contextmanager
def as_it_was() -> Iterator[None]:
    """Inputs of adapted layers and rotated queries and keys are saved; of norms and MLPs only RMSNorm and gated MLPs of
    three layers save less."""
    from lora_cli.adapters import layer
    from lora_cli.base import recompute

    with (
        mock.patch.object(layer, "how_made", lambda x, how=layer.how_made: how(x.detach())),
        mock.patch.object(recompute, "is_elementwise", return_value=False),
        mock.patch.object(recompute, "noting_rotary", return_value=None),
        mock.patch.object(recompute, "_GATED", recompute._GATED[:1]),
    ):
        yield


# ── kept ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(made: tuple[Any, Callable[[], Any]]) -> float:
    """Bytes of a token in the last block."""
    from lora_cli.adapters.targets import block_lists
    from lora_cli.base.activations import measured

    model, loss = made
    blocks = [block for name in block_lists(model) for block in model.get_submodule(name)]
    with measured(blocks) as sizes:
        loss()
    return sizes[-1] / TOKENS


def section_kept() -> dict[str, dict[str, float]]:
    result = {}
    print(f"{'bytes of a token':16}{'before':>10}{'now':>10}{'now/before':>12}{'PEFT':>10}{'now/PEFT':>10}")
    for name in CONFIGS:
        with as_it_was():
            before = kept(ours(name))
        now, theirs = kept(ours(name)), kept(peft(name))
        result[name] = {"before": before, "now": now, "peft": theirs}
        print(f"{name:16}{before:10,.0f}{now:10,.0f}{now / before:12.3f}{theirs:10,.0f}{now / theirs:10.3f}")
    return result


# ── launches ────────────────────────────────────────────────────────────────────────────────────────────────────

# Operations that only describe memory, or take it
FREE = re.compile(
    "view|reshape|_unsafe_view|_reshape_alias|t|transpose|permute|expand|as_strided|slice|select|split|split_with_sizes|"
    "narrow|unsqueeze|squeeze|chunk|detach|alias|empty|empty_like|empty_strided|new_empty|new_empty_strided|unbind|item|"
    "resolve_conj|resolve_neg|_local_scalar_dense|is_nonzero|lift_fresh|set_|resize_|result_type|promote_types|to|dropout"
)


def stand_in(q: Any, k: Any, v: Any, *_: Any, scale: float, **__: Any) -> Any:
    """Attention of one example as one operation: (tokens, heads, head_dim)."""
    heads = (each.transpose(0, 1)[None] for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)[0].transpose(0, 1)


@contextmanager
def gpu_path() -> Iterator[None]:
    from lora_cli.base import attention

    with (
        mock.patch.object(attention, "varlen_attn", stand_in),
        mock.patch.object(attention, "varlen_fits", return_value=True),
    ):
        yield


def launched(name: str, make: Callable[[str], tuple[Any, Callable[[], Any]]]) -> int:
    """By the difference of models of two and three blocks, as the first has an input without gradient."""

    def count(blocks: int) -> int:
        with mock.patch.dict(CONFIGS, {name: lambda own=CONFIGS[name]: longer(own(), blocks)}):
            _, loss = make(name)
        loss().backward()  # gradients exist from here on
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss().backward()
        roots = [each for each in profile.events() or () if not is_aten(each.cpu_parent)]
        return sum(launches_of(each) for each in roots if is_aten(each))

    return count(3) - count(2)


def longer(config: Any, blocks: int) -> Any:
    config.num_hidden_layers = blocks
    config.num_key_value_heads = config.num_attention_heads  # so that the stand-in is one operation
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[-1]] * blocks
    return config


def is_aten(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def launches_of(event: Any) -> int:
    """Of an operation and those that it calls; a product is one, whatever a CPU does for it."""
    name = event.name.removeprefix("aten::")
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul_backward"):
        return 1
    called = [child for child in event.cpu_children if child.name.startswith("aten::")]
    return sum(map(launches_of, called)) if called else int(event.name != name and not FREE.fullmatch(name))


def joined(name: str) -> tuple[Any, Callable[[], Any]]:
    from lora_cli.adapters.beside import join, watch_inputs
    from lora_cli.adapters.trained import trained_modules

    model, loss = ours(name)
    layers = trained_modules(model).values()
    with watch_inputs(layers) as beside:
        loss()
    join(beside, layers)
    for each in layers:
        each.hold_cast(model.dtype)
    return model, loss


def section_launches() -> dict[str, dict[str, int]]:
    result = {}
    print(f"{'launches a block':16}{'apart':>10}{'joined':>10}{'PEFT':>10}{'joined/PEFT':>13}")
    with gpu_path():
        for name in [each for each in CONFIGS if not each.endswith("B")]:
            counts = [launched(name, make) for make in (ours, joined, peft)]
            result[name] = dict(zip(("apart", "joined", "peft"), counts, strict=True))
            print(
                f"{name:16}" + "".join(f"{each:10}" for each in counts) + f"{counts[1] / counts[2]:13.3f}", flush=True
            )
    return result


SECTIONS = {"kept": section_kept, "launches": section_launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    results = {name: SECTIONS[name]() for name in arguments.sections or SECTIONS}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
