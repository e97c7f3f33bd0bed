"""Which layers a recipe's `adapter` section means: names, patterns, blocks, ranks, and errors that say what exists."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from lora_cli import limits
from lora_cli.adapters.patterns import BadPattern, matching
from lora_cli.adapters.targets import Target, block_lists, find_targets, linear_layers
from lora_cli.errors import LoraError

BLOCKS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
HERE = "linear layers here: q_proj (×4), k_proj (×4), v_proj (×4), o_proj (×4), gate_proj (×4), up_proj (×4)"


@pytest.fixture(scope="module")
def llama() -> Any:
    """4 blocks, 32 wide, keys and values 16 wide."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return AutoModelForCausalLM.from_config(config).eval()


def names(model: Any, target_modules: Any = "attention", **settings: Any) -> list[str]:
    return [target.name for target in find_targets(model, target_modules, rank=4, alpha=8.0, **settings)]


def attention(*parts: str, blocks: Any = range(BLOCKS)) -> list[str]:
    return [f"model.layers.{block}.self_attn.{part}" for block in blocks for part in parts]


def mlp(*parts: str, blocks: Any = range(BLOCKS)) -> list[str]:
    return [f"model.layers.{block}.mlp.{part}" for block in blocks for part in parts]


def problem(model: Any, target_modules: Any = "attention", **settings: Any) -> str:
    with pytest.raises(LoraError) as error:
        find_targets(model, target_modules, **({"rank": 4, "alpha": 8.0} | settings))
    assert error.value.exit_code == 2
    return str(error.value)


# target_modules


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("attention", attention(*ATTENTION)),
        (["q_proj", "v_proj"], attention("q_proj", "v_proj")),
        (["v_proj", "q_proj", "v_proj"], attention("q_proj", "v_proj")),  # in the model's order, once each
        ("q_proj", attention("q_proj")),
        (["model.layers.1.self_attn.q_proj"], attention("q_proj", blocks=[1])),
        (["mlp.up_proj", "k_proj"], [n for b in range(4) for n in (f"{b}.self_attn.k_proj", f"{b}.mlp.up_proj")]),
        (r".*\.[qv]_proj", attention("q_proj", "v_proj")),
        (r"model\.layers\.[02]\.mlp\..*", mlp(*MLP, blocks=[0, 2])),
        ([r".*k_proj", "down_proj"], [n for b in range(4) for n in (f"{b}.self_attn.k_proj", f"{b}.mlp.down_proj")]),
    ],
)  # fmt: skip
def test_names_patterns_and_words_mean_exactly_these_layers(llama, target_modules, expected):
    assert [name.removeprefix("model.layers.") for name in names(llama, target_modules)] == [
        name.removeprefix("model.layers.") for name in expected
    ]


def test_all_linear_is_every_linear_layer_but_the_head(llama, gpt2):
    assert sorted(names(llama, "all-linear")) == sorted(attention(*ATTENTION) + mlp(*MLP))
    assert "lm_head" in dict(llama.named_modules())
    assert names(gpt2, "all-linear") == [
        f"transformer.h.{block}.{part}"
        for block in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_a_name_is_a_whole_part_and_a_pattern_matches_the_whole_name():
    name = "model.layers.1.self_attn.q_proj"
    for pattern in (name, "q_proj", "self_attn.q_proj", r".*q_proj", r".*\.1\..*", "model.layers.1.self_attn..*"):
        assert matching(pattern, [name]) == [name], pattern
    for pattern in ("proj", "_proj", "attn.q_proj", "q_pro", "self_attn", "model.layers.1", r"\.q_proj", "q_proj.*"):
        assert matching(pattern, [name]) == [], pattern


def test_a_pattern_that_would_search_for_years_is_given_up():
    pattern = "(.|.)*(.|.)*(.|.)*(.|.)*[!#]"
    started = time.monotonic()
    with pytest.raises(BadPattern, match="takes more than 2 s to match"):
        matching(pattern, [f"model.layers.{block}.self_attn.q_proj" for block in range(1000)])
    assert time.monotonic() - started < 20  # for all names together


def test_a_pattern_nested_too_deeply_is_no_pattern():
    with pytest.raises(BadPattern, match="nested too deeply"):
        matching("(" * 5000 + ")" * 5000, ["q_proj"])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{60000}){60000}",
        "((a{100}){100}){100}",
        "(?:a|b){1000000}",
        "((?=a{60000}))" * 100,
        "|".join(f"name{n}" for n in range(30_000)),
        "[a-z]" * 50_000,
        "(?R)?" * 1000,
        "(?(DEFINE)(?P<a>a{600}))(?&a){600}",
    ],
)
def test_a_pattern_that_takes_all_memory_to_compile_is_refused_at_once(pattern: str):
    began = time.thread_time()
    with pytest.raises(BadPattern):
        matching(pattern, ["model.layers.0.self_attn.q_proj"])
    assert time.thread_time() - began < 1


def test_many_patterns_have_one_limit_of_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 0.5)
    monkeypatch.setattr(limits, "PATTERNS_SECONDS", 0.8)
    names = ["a" * length for length in range(18, 22)]
    began = time.monotonic()
    with pytest.raises(BadPattern, match="takes more than"):
        list(map(matching, ["(a|a)*b|x"] * 1000, [names] * 1000))
    assert time.monotonic() - began < 5


def test_honest_counts_are_no_repetitions():
    names = [f"model.layers.{n}.q_proj" for n in range(30)]
    assert matching(r"model\.layers\.[0-9]{1,2}\.(q|k){1}_proj", names) == names


def test_blocks_are_the_outermost_lists_that_hold_linear_layers(llama, gpt2):
    assert block_lists(llama) == ["model.layers"]
    assert block_lists(gpt2) == ["transformer.h"]
    mixture = nn.Module()
    mixture.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(2)])
    mixture.norms = nn.ModuleList([nn.LayerNorm(2)])
    assert block_lists(mixture) == ["blocks"]


def test_linear_layers_outside_the_blocks_are_adapted_by_name_alone():
    """OPT-350m projects its embeddings into and out of the blocks."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    )
    model = AutoModelForCausalLM.from_config(config)
    assert not [name for name in names(model, "all-linear") if "project" in name]
    assert names(model, ["project_in", "project_out"]) == ["model.decoder.project_out", "model.decoder.project_in"]
    assert "lm_head" not in linear_layers(model)


# exclude_modules and layers


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["o_proj"], attention("q_proj", "k_proj", "v_proj")),
        (["k_proj", "o_proj"], attention("q_proj", "v_proj")),
        ([r".*\.[13]\..*"], attention(*ATTENTION, blocks=[0, 2])),
        (["model.layers.0.self_attn.q_proj", r"model\.layers\.[1-3].*"], attention(*ATTENTION[1:], blocks=[0])),
    ],
)
def test_exclude_modules_leaves_out(llama, exclude, expected):
    assert names(llama, exclude_modules=exclude) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([0], [0]), ([3, 1], [1, 3]), ([-1], [3]), ([-2, -1], [2, 3]), ([0, -1, 3, -4], [0, 3]), (range(4), [0, 1, 2, 3])],
)
def test_layers_count_from_both_ends(llama, layers, expected):
    assert names(llama, layers=list(layers)) == attention(*ATTENTION, blocks=expected)
    assert names(llama, ["down_proj"], layers=list(layers)) == mlp("down_proj", blocks=expected)


def test_settings_work_together(llama, gpt2):
    assert names(llama, "all-linear", exclude_modules=[".*mlp.*", "k_proj"], layers=[-1], projections=["q", "o"]) == (
        attention("q_proj", "o_proj", blocks=[3])
    )
    assert names(gpt2, ["c_proj"], exclude_modules=["mlp.c_proj"], layers=[1]) == ["transformer.h.1.attn.c_proj"]


# Ranks and alphas of their own


def test_rank_and_alpha_patterns_set_single_layers(llama):
    targets = find_targets(
        llama,
        rank=4,
        alpha=8.0,
        rank_pattern={"q_proj": 2, r".*\.[23]\.self_attn\.v_proj": 6, "model.layers.3.self_attn.v_proj": 1},
        alpha_pattern={"o_proj": 32.0, "model.layers.0.self_attn.q_proj": 1.5},
    )
    for target in targets:
        block, part = int(target.name.split(".")[2]), target.name.split(".")[-1]
        rank = {"q_proj": 2, "v_proj": [4, 4, 6, 1][block]}.get(part, 4)  # a later pattern has the last word
        alpha = 32.0 if part == "o_proj" else 1.5 if (block, part) == (0, "q_proj") else 8.0
        assert target == Target(target.name, rank, alpha)


def test_a_fused_layer_has_the_full_rank_for_each_part_it_keeps(gpt2):
    own = {"h.1.attn.c_attn": 3}
    (first, second) = find_targets(
        gpt2, rank=4, alpha=8.0, projections=["q", "v"], rank_pattern=own, alpha_pattern={"h.1.attn.c_attn": 6.0}
    )
    assert (first.name, first.rank, first.alpha) == ("transformer.h.0.attn.c_attn", 8, 16.0)
    assert (second.name, second.rank, second.alpha) == ("transformer.h.1.attn.c_attn", 6, 12.0)
    mask = first.output_mask
    assert mask is not None
    q, k, v = mask.split(32)
    assert torch.equal(q, torch.tensor([True] * 4 + [False] * 4).expand(32, 8))
    assert not k.any()
    assert torch.equal(v, torch.tensor([False] * 4 + [True] * 4).expand(32, 8))


def test_fused_layers_may_have_a_rank_up_to_their_own_size(gpt2):
    targets = find_targets(gpt2, rank=32, alpha=8.0, projections=["q", "k", "v"])
    assert [target.rank for target in targets] == [96, 96]


def test_all_projections_or_none_named_leave_fused_layers_whole(gpt2):
    for target in find_targets(gpt2, rank=4, alpha=8.0, projections=["v", "o", "k", "q"]):
        assert target.output_mask is None
        assert target.rank == 4


# Errors


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "w_proj"]}, "adapter.target_modules: w_proj matched no layer"),
        ({"target_modules": "qproj"}, "adapter.target_modules: qproj matched no layer"),
        ({"target_modules": r".*attn"}, "adapter.target_modules: .*attn matched no layer"),
        ({"target_modules": ["lm_head"]}, "adapter.target_modules: lm_head matched no layer"),
        ({"target_modules": []}, "adapter.target_modules: [] matched no layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}, "adapter.exclude_modules: k_proj matched no"),
        ({"rank_pattern": {"up_proj": 2}}, "adapter.rank_pattern: up_proj matched no layer"),
        ({"alpha_pattern": {"up_proj": 2.0}}, "adapter.alpha_pattern: up_proj matched no layer"),
        ({"exclude_modules": [".*"]}, "no layer is left to adapt"),
        ({"target_modules": "q_proj("}, "'q_proj(' is not a valid regular expression"),
        ({"rank_pattern": {"[": 2}}, "adapter.rank_pattern: '[' is not a valid regular expression"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_names_that_exist(llama, settings, said):
    message = problem(llama, **settings)
    assert said in message
    assert HERE in message
    assert "fix: " in message


def test_a_near_miss_is_suggested(llama):
    assert "fix: did you mean q_proj?" in problem(llama, ["q_prj"])
    assert "fix: choose from that list, or write target_modules: all-linear" in problem(llama, ["c_attn"])


@pytest.mark.parametrize("layer", [4, 17, -5])
def test_a_block_that_is_not_there_is_refused(llama, layer):
    message = problem(llama, layers=[0, layer])
    assert f"adapter.layers: no adapted layer in block {layer}" in message
    assert "blocks with such layers: 0 to 3" in message


def test_a_block_without_targeted_layers_is_refused(llama):
    message = problem(llama, [f"model.layers.{block}.self_attn.q_proj" for block in (1, 2)], layers=[0, 1])
    assert "no adapted layer in block 0" in message
    assert "blocks with such layers: 1 to 2" in message


def test_a_rank_above_its_layer_is_refused(llama):
    assert names(llama, ["q_proj"], rank_pattern={"q_proj": 32})
    message = problem(llama, rank=17)
    assert "rank 17 is above the size of model.layers.0.self_attn.k_proj, whose weight has rank 16 at most" in message
    assert "adapter.rank_pattern" in message
    assert find_targets(llama, rank=17, alpha=1.0, rank_pattern={"k_proj": 16, "v_proj": 16})
    assert find_targets(llama, rank=17, alpha=1.0, exclude_modules=["k_proj", "v_proj"])


def test_projections_that_are_not_there_are_refused(llama):
    message = problem(llama, ["q_proj", "k_proj"], projections=["v"])
    assert "adapter.projections: ['v'] matched no layer" in message
    assert "model.layers.0.self_attn.q_proj" in message
    message = problem(llama, "all-linear", projections=["q", "v"])
    assert "model.layers.0.mlp.gate_proj is not inside an attention module" in message
