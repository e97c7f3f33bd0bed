"""A tiny configuration of every causal-LM type that the installed transformers knows, made from its own defaults."""

from __future__ import annotations

import re
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 600  # the tiny tokenizer has 512; tokens for pictures and sound come after them
LAYERS = 2
# What a setting of this name is made, whatever the architecture; of other names the default stays.
_SIZES = """
1: n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups
2: num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups
    num_global_key_value_heads index_n_heads o_groups num_experts_per_tok moe_topk moe_k moe_top_k
    num_experts_per_token top_k_experts zero_expert_num linear_num_key_heads
4: num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
    num_decoder_attention_heads num_encoder_attention_heads conf_num_attention_heads swa_num_attention_heads
    num_experts num_local_experts n_routed_experts moe_num_experts mamba_dt_rank time_step_rank
    linear_num_value_heads linear_num_heads
8: rotary_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads
    mamba_num_heads n_mamba_heads chunk_size mamba_chunk_size
16: head_dim dim_head d_kv kv_channels swa_head_dim global_head_dim attention_head_size kv_lora_rank q_lora_rank
    qk_head_dim index_head_dim o_lora_rank mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim
    linear_value_head_dim linear_head_dim sliding_window local_attention attention_window_size
    attention_chunk_size window_size hidden_size_per_layer_input
64: hidden_size d_model n_embd embed_dim embedding_size hidden_size_global emb_dim lru_width dim_model
    attention_hidden_size adapter_in_dim adapter_out_dim adapter_input_size cross_attention_hidden_size
    input_embedding_size output_embedding_size embedding_dim vision_output_dim word_embed_proj_dim
    backbone_hidden_size output_dim projector_input_dim projector_output_dim out_hidden_size
    pronunciation_embed_dim shape_embed_dim router_hidden_size codebook_dim ple_embed_dim nemo_final_size
    intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner dff dim_ff ffn_hidden_size d_inner
    feed_forward_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mlp_dim
    moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp dense_intermediate_size
    shared_experts_intermediate_size adapter_mlp_dim prompt_mid_dim
128: mamba_d_ssm
256: max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
    max_source_positions original_max_position_embeddings
"""
_SMALL: dict[str, Any] = {
    name: int(size)
    for size, names in re.findall(r"(\d+):([^:]*?)(?=\n\d|\Z)", _SIZES, re.DOTALL)
    for name in names.split()
}
_SMALL |= {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# What the rules above cannot know of one architecture.
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
_QWEN4 = _INDEXER | {"indexer_compress_ratio": 4}
_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2,
    "index_topk": 8,
    "head_dim": 16,
    "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 24}},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4_PICTURES = {"model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
_GEMMA4_PICTURES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64}
_PHI4_SOUND = {"nemo_conv_channels": 8, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64}
_OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 4 * [64],
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4": {"vision_config": _GEMMA4_PICTURES},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": {"dim_model_base": 64},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "phi4_multimodal": {"audio_config": _PHI4_SOUND},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "layers_block_type": 2 * ["linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str) -> Any:
    """A configuration whose random model has some ten thousand parameters, with layers of each kind it has."""
    return _small(CONFIG_MAPPING[kind], _OWN.get(kind, {}))


def _small(config_class: Any, own: dict[str, Any]) -> Any:
    stated = config_class().to_dict()
    settings: dict[str, Any] = {}
    for at, (name, value) in enumerate(stated.items()):
        if isinstance(value, bool):
            continue
        if name in _ENDS:
            settings[name] = 0
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            settings[name] = 512 + at % 80
        elif name in _SMALL and isinstance(value, int):
            settings[name] = _SMALL[name]
        elif isinstance(value, dict) and value.get("model_type") in CONFIG_MAPPING:
            settings[name] = _small(CONFIG_MAPPING[value["model_type"]], own.get(name, {}))
        elif isinstance(value, dict) and name in config_class.sub_configs:
            settings[name] = _small(config_class.sub_configs[name], own.get(name, {}))
    if "qk_rope_head_dim" in stated:  # latent attention: head_dim is that of the rotary part, and no head is shared
        settings |= {name: value for name, value in (("head_dim", 8), ("num_key_value_heads", 4)) if name in stated}
    depth = _depth(stated)
    if depth:
        settings |= _of_layers(stated, depth)
    return config_class(**(settings | {k: v for k, v in own.items() if not isinstance(v, dict) or k not in settings}))


_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_decoder_layers", "num_encoder_layers", "depth", "num_blocks", "conf_num_hidden_layers"),
)


def _depth(stated: dict[str, Any]) -> int:
    return next((stated[name] for name in _DEPTHS if isinstance(stated.get(name), int)), 0)


def _of_layers(stated: dict[str, Any], depth: int) -> dict[str, Any]:
    """Few layers, among which is each kind that the default has."""
    kinds: list[tuple[Any, ...]] = []
    lists = {n: v for n, v in stated.items() if isinstance(v, list) and len(v) == depth and depth > 3}
    chosen = []
    for at in range(depth):
        kind = tuple(str(v[at]) for v in lists.values() if len(set(map(str, v))) <= 4)
        if kind not in kinds:
            kinds.append(kind)
            chosen.append(at)
    chosen = (chosen + [at for at in range(depth) if at not in chosen])[: max(LAYERS, len(chosen))]
    chosen.sort()
    found: dict[str, Any] = {name: len(chosen) for name in _DEPTHS if isinstance(stated.get(name), int)}
    return found | {name: [value[at] for at in chosen] for name, value in lists.items()}
