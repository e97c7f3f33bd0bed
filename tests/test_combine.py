"""`lora combine`: the sum of updates, whatever the adapters; identities of sums, and PEFT where it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import open_base, with_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lora_cli.adapters.file import read_adapter, save_adapter
from lora_cli.base.source import find_base
from lora_cli.studies.combine import _dare, _low_rank, _ties, weighted

IDS = torch.arange(3, 27).reshape(2, 12)


def updates(folder: Path, weight: float = 1.0) -> dict[str, Tensor]:
    found = read_adapter(folder)
    pairs = {
        name: (each["lora_A.weight"].double(), each["lora_B.weight"].double()) for name, each in found.tensors.items()
    }
    return {name: weight * found.alphas[name] / len(A) * B @ A for name, (A, B) in pairs.items()}


def total(*each: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in each if name in one) for name in {n for one in each for n in one}}  # type: ignore[misc]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert one.keys() == other.keys()
    for name, right in other.items():
        assert_close(one[name], right, rtol=0, atol=tolerance * max(right.norm().item(), 1e-3))


def ours(base: Path, folder: Path, *, seed: int, target_modules: Any = "attention", **options: Any) -> Path:
    folder.mkdir()
    torch.manual_seed(seed)
    model = with_adapter(open_base(base), target_modules, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    save_adapter(model, folder, find_base(str(base)), quantization="none", double_quantization=True)
    return folder


def theirs(base: Path, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **({"r": 4, "lora_alpha": 6} | options))  # type: ignore[arg-type]
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def mixed(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    """Of other ranks, alphas, patterns and layers; one of ours, and PEFT's with and without rsLoRA."""
    one = ours(tiny_llama, tmp_path / "one", seed=1, rank=3, rank_pattern={"q_proj": 5})
    two = theirs(tiny_llama, tmp_path / "two", target_modules=["q_proj", "down_proj"], use_rslora=True)
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}}
    three = theirs(tiny_llama, tmp_path / "three", seed=3, r=6, target_modules=["q_proj", "v_proj"], **patterns)
    for folder in (two, three):  # PEFT names the base by its folder, ours too
        assert read_adapter(folder).base_model == str(tiny_llama)
    return [one, two, three]


def test_it_is_the_sum_and_peft_and_lora_compute_it(mixed: list[Path], tiny_llama: Path, tmp_path: Path, lora: Any):
    words = [f"{mixed[0]}:0.7", f"{mixed[1]}:-0.3", mixed[2]]
    said = json.loads(lora("combine", *words, "--output", tmp_path / "sum", "--json").out)
    right = total(updates(mixed[0], 0.7), updates(mixed[1], -0.3), updates(mixed[2]))
    assert_same(updates(tmp_path / "sum"), right)
    assert said["error"] == 0
    assert said["parts"] == [
        {"name": "one", "weight": 0.7},
        {"name": "two", "weight": -0.3},
        {"name": "three", "weight": 1},
    ]
    norms = {each["name"]: each["norm"] for each in said["layers"]}
    assert norms == pytest.approx({name: each.norm().item() for name, each in right.items()}, rel=1e-5)
    # order does not matter
    assert lora("combine", *reversed(words), "--output", tmp_path / "other").code == 0
    assert_same(updates(tmp_path / "other"), right)
    # merged = merged one after the other
    assert lora("merge", tmp_path / "sum", "--output", tmp_path / "merged", "--dtype", "fp32").code == 0
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, update in right.items():
        weight = before[f"{name}.weight"].double()
        for folder, scale in zip(mixed, (0.7, -0.3, 1.0), strict=True):
            weight = weight + updates(folder, scale).get(name, 0.0)
        assert_close(after[f"{name}.weight"].double(), weight, rtol=0, atol=1e-5 * update.norm().item())
    # PEFT opens it
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path / "sum").merge_and_unload()
    for name in right:
        assert_close(opened.get_submodule(name).weight, after[f"{name}.weight"], rtol=0, atol=1e-5)
    # and nothing in it names a folder of this machine, the base aside
    made = read_adapter(tmp_path / "sum")
    assert made.config["target_modules"] == ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    kept = made.metadata
    assert kept.made_of == "0.7 × one - 0.3 × two + 1 × three"
    assert kept.base_fingerprint == find_base(str(tiny_llama)).fingerprint
    assert str(tmp_path) not in (tmp_path / "sum" / "README.md").read_text()


def test_a_smaller_rank_loses_what_is_said(mixed: list[Path], tmp_path: Path, lora: Any):
    said = json.loads(lora("combine", *mixed, "--rank", 4, "--output", tmp_path / "small", "--json").out)
    right, small = total(*map(updates, mixed)), updates(tmp_path / "small")
    for each in said["layers"]:
        values = torch.linalg.svdvals(right[each["name"]])
        assert each["lost"] == pytest.approx(values[4:].norm().item(), rel=1e-4, abs=1e-6)
        distance = (small[each["name"]] - right[each["name"]]).norm().item()
        assert distance == pytest.approx(each["lost"], rel=1e-4, abs=1e-5)
    assert max(each["rank"] for each in said["layers"]) == 4


def test_one_alone_is_itself_and_one_against_itself_is_refused(mixed: list[Path], tmp_path: Path, lora: Any):
    for number, folder in enumerate(mixed):
        assert lora("combine", folder, "--output", tmp_path / f"{number}").code == 0
        assert_same(updates(tmp_path / f"{number}"), updates(folder))
    for method in ([], ["--rank", 2], ["--method", "ties", "--rank", 2], ["--method", "dare", "--rank", 2]):
        said = lora("combine", f"{mixed[0]}:0.5", f"{mixed[0]}:-0.5", *method, "--output", tmp_path / "x")
        assert "nothing is left" in said.error
        assert not (tmp_path / "x").exists()


FACTORS = st.tuples(st.integers(1, 4), st.floats(-2, 2, width=16).filter(bool), st.integers(0, 99))


def drawn(rank: int, weight: float, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 7, generator=draw), weight * torch.randn(5, rank, generator=draw)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FACTORS, min_size=1, max_size=4), st.integers(1, 9))
def test_sums_of_factors(several: list[tuple[int, float, int]], rank: int):
    own = [drawn(*each) for each in several]
    right = sum(B.double() @ A.double() for A, B in own)
    values = torch.linalg.svdvals(right)  # type: ignore[arg-type]
    (A, B), norm, lost = _low_rank(own, rank)
    scale = sum((B.norm() * A.norm()).item() for A, B in own)
    assert norm == pytest.approx(values.norm().item(), abs=1e-6 * scale)
    assert lost == pytest.approx(values[rank:].norm().item(), abs=1e-6 * scale)
    assert (B.double() @ A.double() - right).norm().item() == pytest.approx(lost, abs=1e-5 * scale)
    (A, B), norm, _ = _low_rank([*own, *((A, -B) for A, B in own)], rank)
    assert norm <= 1e-6 * scale
    assert (B @ A).norm().item() <= 1e-5 * scale


def test_ties_and_dare_are_those_of_the_papers():
    a, b = torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[1.0, 5.0, 0.2, -2.0]])
    own = [(a, drawn(1, 1, 1)), (b, drawn(1, 1, 2))]
    # of each the three largest; signs of 5, 2, 0 and 0 are +, +, none; the mean of those that agree
    assert_close(_ties(own, 0.75), torch.tensor([[2.5, 5.0, 0.0, 0.0]]))
    assert_close(_ties(own, 1.0), torch.tensor([[2.5, 5.0, 0.15, 0.0]]))
    assert_close(_ties(own[::-1], 0.75), _ties(own, 0.75))
    assert not _ties(own, 0.01).any()
    wide = [(torch.full((300, 300), 2.0), drawn(1, 1, seed)) for seed in (1, 2)]
    for seed in (0, 1):
        made = _dare(wide, 0.25, seed)
        assert set(made.unique().tolist()) == {0.0, 8.0, 16.0}
        assert made.mean().item() == pytest.approx(4.0, rel=0.03)  # the expectation is the sum
    assert_close(_dare(wide, 0.25, 1), _dare(wide[::-1], 0.25, 1))
    assert not torch.equal(_dare(wide, 0.25, 0), _dare(wide, 0.25, 1))
    assert_close(_dare(own, 1.0, 0), a + b)


def in_peft(base: Path, folders: list[Path], weights: list[float], how: str, **options: Any) -> dict[str, Tensor]:
    model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], "a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, f"a{number}")
    names = [f"a{number}" for number in range(len(folders))]
    model.add_weighted_adapter(names, weights, "sum", combination_type=how, **options)
    layers = {name: each for name, each in model.base_model.model.named_modules() if hasattr(each, "lora_A")}
    return {name: each.get_delta_weight("sum").double() for name, each in layers.items() if "sum" in each.lora_A}


def test_peft_agrees_where_it_is_right(tiny_llama: Path, tmp_path: Path, lora: Any):
    one = theirs(tiny_llama, tmp_path / "one", target_modules=["q_proj", "v_proj"])
    two = theirs(tiny_llama, tmp_path / "two", seed=2, r=8, lora_alpha=3, target_modules=["q_proj"])
    words = [f"{one}:0.7", f"{two}:-0.4"]
    for how, mine in (("cat", []), ("svd", ["--rank", 5])):
        assert lora("combine", *words, *mine, "--output", tmp_path / how).code == 0
        assert_same(updates(tmp_path / how), in_peft(tiny_llama, [one, two], [0.7, -0.4], how, svd_rank=5), 1e-5)
    # merged = merged one after the other
    assert lora("combine", one, two, "--output", tmp_path / "both").code == 0
    assert lora("merge", tmp_path / "both", "--output", tmp_path / "merged", "--proof", "none").code == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for folder in (one, two):
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in model.state_dict().items():
        assert_close(merged[name], weight, rtol=0, atol=1e-6)
    full = ["--rank", 32, "--method", "ties", "--density", 0.5]  # PEFT fails where a layer is smaller than the rank
    assert lora("combine", one, two, *full, "--output", tmp_path / "ties").code == 0
    right = in_peft(tiny_llama, [one, two], [1.0, 1.0], "ties_svd", svd_rank=32, density=0.5)
    assert_same(updates(tmp_path / "ties"), right, 1e-5)


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("cat", {"use_rslora": True}, {}),  # the new adapter's alpha is its rank, and its scaling alpha / √rank
        ("svd", {"use_rslora": True}, {}),
        ("cat", {"layers_to_transform": [0]}, {"layers_to_transform": [1]}),  # layers of the second alone are lost
        ("cat", {"exclude_modules": ["v_proj"]}, {}),
        ("linear", {}, {}),  # (A + A') and (B + B'), whose product has B A' and B' A as well
    ],
    ids=["rslora-cat", "rslora-svd", "other-layers", "excluded", "linear"],
)
def test_where_peft_is_wrong_this_is_right(
    how: str, first: Any, second: Any, tiny_llama: Path, tmp_path: Path, lora: Any
):
    one = theirs(tiny_llama, tmp_path / "one", target_modules=["q_proj", "v_proj"], **first)
    two = theirs(tiny_llama, tmp_path / "two", seed=2, target_modules=["q_proj", "v_proj"], **second)
    right = total(updates(one, 0.7), updates(two, 0.3))
    assert lora("combine", f"{one}:0.7", f"{two}:0.3", "--output", tmp_path / "sum").code == 0
    assert_same(updates(tmp_path / "sum"), right)
    wrong = in_peft(tiny_llama, [one, two], [0.7, 0.3], how)
    off = max((right[name] - wrong.get(name, 0.0)).norm().item() / right[name].norm().item() for name in right)
    assert off > 0.3


@pytest.mark.parametrize("rank", [[], ["--rank", 2], ["--method", "ties", "--rank", 3]])
def test_qa_lora_keeps_its_groups(rank: list[Any], run_recipe: Any, tmp_path: Path, lora: Any):
    adapter = {"method": "qa_lora", "target_modules": "attention", "rank": 2}
    run, _ = run_recipe(quantization="int4", adapter=adapter)
    said = json.loads(lora("combine", run, f"{run}:-0.5", *rank, "--output", tmp_path / "sum", "--json").out)
    made = read_adapter(tmp_path / "sum")
    assert (made.metadata.method, made.metadata.quantization) == ("qa_lora", "int4")
    right = updates(run / "adapter", 0.5)
    for each in said["layers"]:
        A = made.tensors[each["name"]]["lora_A.weight"].unflatten(1, (-1, made.metadata.group_size))
        assert torch.equal(A, A[..., :1].expand_as(A))
        if not rank[2:]:
            assert each["norm"] == pytest.approx(right[each["name"]].norm().item(), rel=1e-3)
    if not rank[2:]:  # both parts are one adapter, so that rank 2 holds their sum
        assert_same(updates(tmp_path / "sum"), right, 1e-5)
    assert lora("merge", tmp_path / "sum", "--output", tmp_path / "merged").code == 0
    assert lora("resize", tmp_path / "sum", "--rank", 1, "--output", tmp_path / "small").code == 0
    assert lora("merge", tmp_path / "small", "--output", tmp_path / "merged-small").code == 0


def test_weights_are_read_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:0.5", "c:x"):
        (tmp_path / name).mkdir()
    assert weighted("a") == ("a", 1)
    assert weighted("a:0.25") == ("a", 0.25)
    assert weighted("a:-1e-1") == ("a", -0.1)
    assert weighted("b:0.5") == ("b:0.5", 1)
    assert weighted("b:0.5:2") == ("b:0.5", 2)
    assert weighted("c:x") == ("c:x", 1)
    assert weighted(r"C:\runs\a") == (r"C:\runs\a", 1)
    assert weighted(r"C:\runs\a:0.7") == (r"C:\runs\a", 0.7)


def test_mistakes(mixed: list[Path], tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, lora: Any):
    one, out = mixed[0], ["--output", tmp_path / "x"]
    for weight in ("0", "nan", "x", "inf", "1_0", ""):
        assert "is not a weight" in lora("combine", f"{one}:{weight}", *out).error
    assert "no such folder" in lora("combine", one, tmp_path / "gone:0.5", *out).error
    assert "needs a rank" in lora("combine", one, one, "--method", "ties", *out).error
    assert "--density does nothing" in lora("combine", one, one, "--density", 0.5, *out).error
    assert "--seed does nothing" in lora("combine", one, one, "--method", "ties", "--rank", 2, "--seed", 1, *out).error
    assert "--density is 2" in lora("combine", one, one, "--method", "dare", "--density", 2, *out).error
    assert "too large for fp32" in lora("combine", f"{one}:1e300", *out).error
    for method in ("ties", "dare"):
        assert "too large for fp32" in lora("combine", f"{one}:1e38", "--method", method, "--rank", 2, *out).error
    assert "inside the adapter's folder" in lora("combine", one, "--output", one / "x").error
    other = ours(tiny_gpt2, tmp_path / "other", seed=0)
    assert "is for another base model" in lora("combine", one, other, *out).error
    config = json.loads((mixed[1] / "adapter_config.json").read_text())
    for change, said in (
        ({"base_model_name_or_path": "owner/another"}, "is for another base model"),
        ({"use_dora": True}, "use_dora: True"),
    ):
        (mixed[1] / "adapter_config.json").write_text(json.dumps(config | change))
        assert said in lora("combine", one, mixed[1], *out).error
    narrow = theirs(tiny_llama, tmp_path / "narrow", target_modules=["q_proj"])
    wide = theirs(tiny_llama, tmp_path / "wide", target_modules=["q_proj"])
    tensors = load_file(wide / "adapter_model.safetensors")
    cut = {name: each[:, :-1].contiguous() if "lora_A" in name else each for name, each in tensors.items()}
    save_file(cut, wide / "adapter_model.safetensors", {"format": "pt"})
    embedded = tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(512, 64)}
    save_file(embedded, narrow / "adapter_model.safetensors", {"format": "pt"})
    assert "brings weights of its own" in lora("combine", one, narrow, *out).error
    save_file(tensors, narrow / "adapter_model.safetensors", {"format": "pt"})
    assert "the update of narrow is (64, 64), that of wide (64, 63)" in lora("combine", narrow, wide, *out).error
    assert not (tmp_path / "x").exists()


def test_what_the_adapters_do_not_agree_on_is_said(mixed: list[Path], tiny_llama: Path, tmp_path: Path, lora: Any):
    model = with_adapter(open_base(tiny_llama))
    for name, system in (("a", "Be short."), ("b", None)):
        (tmp_path / name).mkdir()
        settings = {"prompting": "template", "system": system, "chat_template": "{{ messages }}"}
        base = find_base(str(tiny_llama))
        save_adapter(model, tmp_path / name, base, quantization="none", double_quantization=True, **settings)
    said = lora("combine", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "sum")
    assert "system differs between the adapters (Be short. and None)" in said.out
    kept = read_adapter(tmp_path / "sum").metadata
    assert (kept.prompting, kept.system) == ("template", None)
    assert (tmp_path / "sum" / "chat_template.jinja").read_text() == "{{ messages }}"
