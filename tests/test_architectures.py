"""Every architecture that matters: what is adapted, that gradients arrive, that packing and the loss are exact.

Names and layouts are written down here from each architecture's own code, independently of how we find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import open_base, randomize_adapter, save_tiny, with_adapter
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.projections import output_parts
from lora_cli.adapters.targets import block_lists, find_targets
from lora_cli.adapters.trained import trained_modules, trained_parameters
from lora_cli.base.load import load_model
from lora_cli.base.source import find_base
from lora_cli.base.trials import packing_difference, require_no_leak
from lora_cli.data.batches import MicroBatch, collate
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import logit_rule, summed_loss, target_logits
from lora_cli.studies.equalities import examples, fresh, recomputed, side_by_side

CPU = torch.device("cpu")
WINDOW = 8  # tokens; some examples below are longer
IDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Weights of deviation 0.2 ≈ 1/√width: attention is then far from uniform, so that a leak or a wrong mask shows.
WIDE = IDS | {"initializer_range": 0.2, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
FULL = WIDE | {"intermediate_size": 64, "max_position_embeddings": 128}  # keys and values for each head
GROUPED = FULL | {"num_key_value_heads": 2}  # head_dim 16: q has 64 outputs, k and v have 32
GPT = IDS | {"initializer_range": 0.2, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}

SEPARATE = {f"self_attn.{part}_proj": part for part in "qkvo"}
OUT_PROJ = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o"}
GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj"
Q, K, V = "q" * 16, "k" * 16, "v" * 16  # the outputs of one head


@dataclass(frozen=True)
class Architecture:
    """layout: each linear layer of an attention, named within its block, and the part each of its outputs belongs to.

    One letter stands for all outputs. others: the block's other linear layers. packs: whether examples can share a row.
    samples: whether training draws random numbers even without dropout.
    """

    config: Callable[[], Any]
    blocks: str
    layout: dict[str, str]
    others: str
    packs: bool = True
    samples: bool = False

    @property
    def fused(self) -> bool:
        return any(len(set(parts)) > 1 for parts in self.layout.values())


A = Architecture
ARCHITECTURES = {
    "llama": A(lambda: hf.LlamaConfig(**GROUPED), "model.layers", SEPARATE, GATED),
    "mistral": A(lambda: hf.MistralConfig(**GROUPED, sliding_window=WINDOW), "model.layers", SEPARATE, GATED),
    "qwen2": A(lambda: hf.Qwen2Config(**GROUPED), "model.layers", SEPARATE, GATED),
    "qwen3": A(lambda: hf.Qwen3Config(**GROUPED, head_dim=16), "model.layers", SEPARATE, GATED),
    "qwen2-moe": A(
        lambda: hf.Qwen2MoeConfig(
            **GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16,
            use_sliding_window=True, max_window_layers=0, sliding_window=WINDOW,
        ),
        "model.layers",
        SEPARATE,
        "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj mlp.shared_expert_gate",
    ),
    "gemma": A(lambda: hf.GemmaConfig(**GROUPED, head_dim=16), "model.layers", SEPARATE, GATED),
    "gemma2": A(
        lambda: hf.Gemma2Config(
            **GROUPED, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16,
            attn_logit_softcapping=1.0, final_logit_softcapping=2.0,
        ),
        "model.layers",
        SEPARATE,
        GATED,
    ),
    "gemma3": A(
        lambda: hf.Gemma3TextConfig(
            **GROUPED, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "model.layers",
        SEPARATE,
        GATED,
    ),
    "phi": A(
        lambda: hf.PhiConfig(**FULL),
        "model.layers",
        {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.dense": "o"},
        "mlp.fc1 mlp.fc2",
    ),
    "phi3": A(
        lambda: hf.Phi3Config(**GROUPED, sliding_window=WINDOW),
        "model.layers",
        {"self_attn.qkv_proj": 4 * Q + 2 * K + 2 * V, "self_attn.o_proj": "o"},
        "mlp.gate_up_proj mlp.down_proj",
    ),
    "phimoe": A(
        lambda: hf.PhimoeConfig(**GROUPED, sliding_window=WINDOW, num_local_experts=4),
        "model.layers",
        SEPARATE,
        "",  # its router is a subclass of nn.Linear, but returns three things
        samples=True,
    ),
    "gpt2": A(
        lambda: hf.GPT2Config(**GPT),
        "transformer.h",
        {"attn.c_attn": 4 * Q + 4 * K + 4 * V, "attn.c_proj": "o"},
        "mlp.c_fc mlp.c_proj",
    ),
    "openai-gpt": A(
        lambda: hf.OpenAIGPTConfig(**GPT),
        "transformer.h",
        {"attn.c_attn": 4 * Q + 4 * K + 4 * V, "attn.c_proj": "o"},
        "mlp.c_fc mlp.c_proj",
        packs=False,  # its mask is not told the positions
    ),
    "gpt-neo": A(
        lambda: hf.GPTNeoConfig(
            **IDS, initializer_range=0.2, hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=128,
            attention_types=[[["global", "local"], 1]], window_size=WINDOW,
        ),
        "transformer.h",
        {"attn.attention.q_proj": "q", "attn.attention.k_proj": "k", "attn.attention.v_proj": "v"}
        | {"attn.attention.out_proj": "o"},
        "mlp.c_fc mlp.c_proj",
    ),
    "gpt-neox": A(
        lambda: hf.GPTNeoXConfig(**FULL),
        "gpt_neox.layers",
        {"attention.query_key_value": 4 * (Q + K + V), "attention.dense": "o"},
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
    "gpt-j": A(
        lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
        "transformer.h",
        {"attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v", "attn.out_proj": "o"},
        "mlp.fc_in mlp.fc_out",
    ),
    "opt": A(
        lambda: hf.OPTConfig(**FULL, ffn_dim=64, init_std=0.2), "model.decoder.layers", OUT_PROJ, "fc1 fc2"
    ),
    "opt-350m": A(  # has linear layers around the blocks, project_in and project_out
        lambda: hf.OPTConfig(**FULL, ffn_dim=64, init_std=0.2, word_embed_proj_dim=16, do_layer_norm_before=False),
        "model.decoder.layers",
        OUT_PROJ,
        "fc1 fc2",
    ),
    "falcon-7b": A(  # one key and value for all heads
        lambda: hf.FalconConfig(**FULL, multi_query=True, new_decoder_architecture=False, alibi=False),
        "transformer.h",
        {"self_attention.query_key_value": 4 * Q + K + V, "self_attention.dense": "o"},
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        packs=False,
    ),
    "falcon-40b": A(  # in groups of two queries
        lambda: hf.FalconConfig(**FULL, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
        "transformer.h",
        {"self_attention.query_key_value": 2 * (2 * Q + K + V), "self_attention.dense": "o"},
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        packs=False,
    ),
    "falcon-rw": A(
        lambda: hf.FalconConfig(**FULL, multi_query=False, new_decoder_architecture=False, alibi=True),
        "transformer.h",
        {"self_attention.query_key_value": 4 * (Q + K + V), "self_attention.dense": "o"},
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        packs=False,
    ),
    "bloom": A(  # ALiBi counts positions along the whole row
        lambda: hf.BloomConfig(**IDS, initializer_range=0.2, hidden_size=64, n_layer=2, n_head=4),
        "transformer.h",
        {"self_attention.query_key_value": 4 * (Q + K + V), "self_attention.dense": "o"},
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        packs=False,
    ),
    "mpt": A(
        lambda: hf.MptConfig(
            **IDS, initializer_range=0.2, d_model=64, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2
        ),
        "transformer.blocks",
        {"attn.Wqkv": 4 * Q + 4 * K + 4 * V, "attn.out_proj": "o"},
        "ffn.up_proj ffn.down_proj",
        packs=False,
    ),
    "stablelm": A(lambda: hf.StableLmConfig(**GROUPED), "model.layers", SEPARATE, GATED),
    "olmo": A(lambda: hf.OlmoConfig(**GROUPED), "model.layers", SEPARATE, GATED),
    "olmo2": A(lambda: hf.Olmo2Config(**GROUPED), "model.layers", SEPARATE, GATED),
    "granite": A(
        lambda: hf.GraniteConfig(
            **GROUPED, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3
        ),
        "model.layers",
        SEPARATE,
        GATED,
    ),
    "cohere": A(lambda: hf.CohereConfig(**GROUPED, logit_scale=0.25), "model.layers", SEPARATE, GATED),
    "starcoder2": A(
        lambda: hf.Starcoder2Config(**GROUPED, sliding_window=WINDOW), "model.layers", SEPARATE, "mlp.c_fc mlp.c_proj"
    ),
    "codegen": A(  # four blocks of queries, then values, then keys
        lambda: hf.CodeGenConfig(**GPT, rotary_dim=4),
        "transformer.h",
        {"attn.qkv_proj": 4 * (Q + V + K), "attn.out_proj": "o"},
        "mlp.fc_in mlp.fc_out",
    ),
    "gpt-bigcode": A(  # StarCoder: one key and value for all heads
        lambda: hf.GPTBigCodeConfig(**GPT, multi_query=True),
        "transformer.h",
        {"attn.c_attn": 4 * Q + K + V, "attn.c_proj": "o"},
        "mlp.c_fc mlp.c_proj",
    ),
    "gpt-bigcode-multi-head": A(
        lambda: hf.GPTBigCodeConfig(**GPT, multi_query=False),
        "transformer.h",
        {"attn.c_attn": 4 * (Q + K + V), "attn.c_proj": "o"},
        "mlp.c_fc mlp.c_proj",
    ),
    "llama4": A(  # attends within chunks
        lambda: hf.Llama4TextConfig(
            **GROUPED, head_dim=16, attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=64,
            interleave_moe_layer_step=1, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
        ),
        "model.layers",
        SEPARATE,
        "feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj feed_forward.shared_expert.down_proj",
    ),
    "nemotron": A(  # its blocks do not tell attention where examples begin
        lambda: hf.NemotronConfig(**GROUPED, head_dim=16),
        "model.layers",
        SEPARATE,
        "mlp.up_proj mlp.down_proj",
        packs=False,
    ),
    "dbrx": A(
        lambda: hf.DbrxConfig(
            **IDS, initializer_range=0.2, d_model=64, n_heads=4, n_layers=2, max_seq_len=128,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "transformer.blocks",
        {"norm_attn_norm.attn.Wqkv": 4 * Q + 2 * K + 2 * V, "norm_attn_norm.attn.out_proj": "o"},
        "ffn.router.layer",
    ),
    "mixtral": A(  # transformers holds the experts as one tensor each, not as linear layers
        lambda: hf.MixtralConfig(**GROUPED, sliding_window=WINDOW, num_local_experts=4),
        "model.layers",
        SEPARATE,
        "",
    ),
    "deepseek-v3": A(  # the compressed keys and values count as v: they feed both
        lambda: hf.DeepseekV3Config(**FULL, **DEEPSEEK, q_lora_rank=16, first_k_dense_replace=0),
        "model.layers",
        {"self_attn.q_a_proj": "q", "self_attn.q_b_proj": "q", "self_attn.kv_a_proj_with_mqa": V + "kkkk"}
        | {"self_attn.kv_b_proj": 4 * (K[:8] + V[:8]), "self_attn.o_proj": "o"},
        "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj",
    ),
}  # fmt: skip
PACKING = [name for name, architecture in ARCHITECTURES.items() if architecture.packs]
FUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.fused]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            save_tiny(ARCHITECTURES[name].config(), root / name, tokenizer=tokenizer)
        return root / name

    return folder


@pytest.fixture
def load(folder_of: Callable[[str], Path]) -> Callable[..., Any]:
    def loaded(name: str, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
        return open_base(folder_of(name), quantization, dtype)

    return loaded


def adapted(model: Any, target_modules: Any = "attention", **settings: Any) -> Any:
    return with_adapter(model, target_modules, rank=2, alpha=4.0, **settings)


def batch_of(rows: list[Example], *, packed: bool) -> MicroBatch:
    return collate(rows, packed=packed, pad_id=0, device=CPU)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).reshape(2, 10)).logits


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of A and B by name, and forgets them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def names_of(architecture: Architecture, parts: Any) -> list[str]:
    return sorted(f"{architecture.blocks}.{block}.{part}" for block in (0, 1) for part in parts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_and_all_linear_are_the_layers_of_the_architecture(name, load):
    architecture, model = ARCHITECTURES[name], load(name)
    attention = find_targets(model, "attention", rank=1, alpha=1)
    assert sorted(target.name for target in attention) == names_of(architecture, architecture.layout)
    every = find_targets(model, "all-linear", rank=1, alpha=1)
    expected = names_of(architecture, [*architecture.layout, *architecture.others.split()])
    assert sorted(target.name for target in every) == expected
    # And nothing was forgotten in the table above: these are all linear layers of the blocks.
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(architecture.blocks) and name[-7:] != ".router"
    ]
    assert sorted(inside) == expected


@pytest.mark.parametrize(
    ("name", "quantization"),
    [(name, "none") for name in ARCHITECTURES]
    + [(name, "nf4") for name in ("llama", "gpt2", "phi3", "gemma2", "falcon-40b", "mixtral", "gpt-bigcode")]
    + [(name, "int8") for name in ("llama", "gpt2", "gpt-neox")],
)
def test_fresh_adapter_changes_nothing_and_a_random_one_trains_everywhere(name, quantization, load):
    model = load(name, quantization)
    before, targets = logits(model), find_targets(model, "all-linear", rank=1, alpha=4.0)
    assert fresh(model) == 0
    randomize_adapter(model)
    # Ten times what rounding gives. All of these adapters together move logits by a good part of their deviation.
    assert (logits(model) - before).abs().max() > 1e-2 * before.std()
    model.train()
    summed_loss(model, batch_of(examples(20, 9), packed=False)).backward()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained_parameters(model)}
    assert sorted(trained_modules(model)) == sorted(target.name for target in targets)
    for path, layer in trained_modules(model).items():
        for part in (layer.lora_A, layer.lora_B):
            assert part.grad is not None, path
            assert part.grad.isfinite().all(), path
            assert part.grad.any(), path


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if not one.samples])
def test_the_frozen_path_computes_the_same_in_training(name, load):
    """GPT-2, GPT-J, OPT and others drop a tenth by default; Phi-3.5-MoE alone samples its experts in training."""
    model = load(name)
    expected = logits(model)
    assert torch.equal(logits(model.train()), expected)


@pytest.mark.parametrize(
    ("name", "quantization", "dtype"),
    [(name, "none", torch.float32) for name in ARCHITECTURES]
    + [(name, "none", torch.bfloat16) for name in [*FUSED, "llama", "qwen3"]]
    + [(name, "nf4", torch.bfloat16) for name in ("gpt2", "gpt-neox", "phi3", "falcon-40b", "codegen", "llama")]
    + [(name, "int8", torch.float32) for name in ("gpt2", "gpt-neox")],
)
def test_projections_are_found_where_the_architecture_puts_them(name, quantization, dtype, load):
    architecture, model = ARCHITECTURES[name], load(name, quantization, dtype)
    names = names_of(architecture, architecture.layout)
    found = output_parts(model, names)
    for path in names:
        layout = architecture.layout[path.split(".", architecture.blocks.count(".") + 2)[-1]]
        assert "".join(found[path]) == (layout if len(layout) > 1 else layout * len(found[path])), path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_projections_q_and_v_train_those_alone(name, load):
    architecture, model = ARCHITECTURES[name], load(name)
    targets = find_targets(model, "attention", rank=2, alpha=4.0, projections=["q", "v"])
    layout = {path: parts for path, parts in architecture.layout.items() if set(parts) & {"q", "v"}}
    assert sorted(target.name for target in targets) == names_of(architecture, layout)
    attach(model, targets)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(2):
        summed_loss(model, batch_of(examples(20, 9), packed=False)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, layer in trained_modules(model).items():
        parts = layout[path.split(".", architecture.blocks.count(".") + 2)[-1]]
        delta = layer.delta_weight()
        assert layer.scaling == 2.0, "the scaling is that of the recipe, however many parts share a layer"
        if len(parts) == 1:
            assert delta.any(1).all()
            continue
        trained = torch.tensor([part in "qv" for part in parts])
        assert delta[trained].any(1).all()
        assert not delta[~trained].any()
        for part in {"q", "v"} & set(parts):  # each part has the rank that was asked for
            rows = torch.tensor([one == part for one in parts])
            assert torch.linalg.matrix_rank(delta[rows], rtol=1e-4) == 2


@pytest.mark.parametrize("name", PACKING)
def test_packed_equals_one_at_a_time(name, load):
    """E3, with examples longer than the sliding window where there is one."""
    model = load(name)
    assert packing_difference(model, CPU)[0] < 1e-4  # rounding gives 1e-6 here, a leak 1
    require_no_leak(model, CPU)
    adapted(model).train(not ARCHITECTURES[name].samples)
    assert side_by_side(model, examples(20, 5, 13, 2)) <= 1e-5  # measured 3e-7


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in PACKING])
def test_packing_is_refused_where_examples_would_see_each_other(name, load):
    model = load(name)
    assert packing_difference(model, CPU)[0] > 1e-2
    with pytest.raises(LoraError, match="does not keep packed examples apart") as error:
        require_no_leak(model.train(), CPU)
    assert type(model).__name__ in str(error.value)
    assert "data.packing: false" in str(error.value)
    assert model.training


@pytest.mark.parametrize("name", ["lfm2", "qwen3-next"])
def test_packing_is_refused_where_a_state_runs_along_the_row(name, tmp_path, tokenizer):
    """Hybrid models: their softmax attention alone is `attention`, their convolutions and states leak."""
    kinds = {"lfm2": ["conv", "full_attention"], "qwen3-next": ["linear_attention", "full_attention"]}
    configs = {
        "lfm2": lambda kind: hf.Lfm2Config(**GROUPED, block_ff_dim=48, layer_types=kind),
        "qwen3-next": lambda kind: hf.Qwen3NextConfig(
            **GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16, head_dim=16, layer_types=kind,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        ),
    }  # fmt: skip
    folder = save_tiny(configs[name](kinds[name]), tmp_path / name, tokenizer=tokenizer)
    model = load_model(find_base(str(folder)), quantization="none", dtype=torch.float32, device=CPU)
    names = [target.name for target in find_targets(model, "attention", rank=1, alpha=1)]
    assert len(names) == 4
    assert all(path.startswith("model.layers.1.self_attn.") for path in names)
    with pytest.raises(LoraError, match=r"does not keep packed examples apart|cannot compute packed rows") as error:
        require_no_leak(model, CPU)
    assert error.value.fix == "write data.packing: false"


def test_attention_with_sinks_is_adapted_whole_or_refused(tmp_path, tokenizer):
    """gpt-oss: the first token does not see only itself, so its parts cannot be told; they must not be guessed."""
    config = hf.GptOssConfig(**GROUPED, head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    folder = save_tiny(config, tmp_path / "gpt-oss", tokenizer=tokenizer)
    model = load_model(find_base(str(folder)), quantization="none", dtype=torch.float32, device=CPU)
    assert len(find_targets(model, "attention", rank=1, alpha=1)) == 8
    with pytest.raises(LoraError, match="neither q, k, v nor o"):
        find_targets(model, "attention", rank=1, alpha=1, projections=["q", "v"])
    with pytest.raises(LoraError, match="does not keep packed examples apart"):
        require_no_leak(model, CPU)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_of_the_targets_is_the_loss_of_transformers(name, load, folder_of):
    """Logits for targets alone, padded and packed = all logits, by a model that transformers itself opened."""
    model, rows = load(name), examples(20, 5, 13)
    reference = hf.AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    padded = batch_of(rows, packed=False)
    mask = padded.inputs["attention_mask"]
    labels = torch.full_like(mask, -100)
    for row, example in enumerate(rows):
        trained = torch.tensor(example.trained)
        labels[row, : len(example.ids)] = torch.where(trained, torch.tensor(example.ids), -100)
    output = reference(input_ids=padded.inputs["input_ids"], attention_mask=mask, labels=labels)
    with torch.no_grad():
        loss = summed_loss(model, padded)
        expected = output.logits.flatten(0, 1)[padded.positions]
        torch.testing.assert_close(target_logits(model, padded), expected, rtol=1e-5, atol=1e-5)  # logits are near 1
        torch.testing.assert_close(loss / len(padded.targets), output.loss.detach(), rtol=1e-5, atol=0)
        summed = F.cross_entropy(expected, padded.targets, reduction="sum")
        torch.testing.assert_close(loss, summed, rtol=1e-5, atol=0)
        if ARCHITECTURES[name].packs:
            torch.testing.assert_close(summed_loss(model, batch_of(rows, packed=True)), summed, rtol=1e-5, atol=0)
    assert len(padded.targets) == sum(example.targets for example in rows)


@pytest.mark.parametrize(
    ("name", "quantization", "packed"),
    [(name, "none", True) for name in ("llama", "mistral", "gemma2", "phi3", "gpt2", "qwen2-moe")]
    + [(name, "none", False) for name in ("falcon-40b", "bloom", "mpt")]
    + [("llama", "nf4", True), ("gpt2", "nf4", True)],
)
def test_gradient_checkpointing_changes_no_gradient(name, quantization, packed, load):
    """E5."""
    model = adapted(load(name, quantization)).train()
    batch = batch_of(examples(20, 5, 13), packed=packed)
    logit_rule(model)  # tries the model once
    calls, blocks = count_calls(model), [each for outer in block_lists(model) for each in model.get_submodule(outer)]
    summed_loss(model, batch)
    forwards = calls["count"]
    assert recomputed(model, batch) <= 1e-5
    again = calls["count"] - 3 * forwards  # it stops when all that is needed is there, so not after the last layer
    assert forwards - len(blocks) <= again <= forwards, "every block was computed twice: checkpointing was on"
    assert again > 0


def count_calls(model: Any) -> dict[str, int]:
    calls = {"count": 0}

    def count(*_: Any) -> None:
        calls["count"] += 1

    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.register_forward_hook(count)
    return calls
