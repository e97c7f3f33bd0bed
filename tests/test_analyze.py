"""`lora analyze`: the paper's equations in closed form, on updates whose directions are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import open_base, with_adapter

from lora_cli.adapters.file import save_adapter
from lora_cli.adapters.trained import trained_modules
from lora_cli.base.linear import dense_weight
from lora_cli.base.source import find_base
from lora_cli.studies.analyze import amplified, analyze, similarity
from lora_cli.studies.inspect import weight_beside


def rows(*numbers: int, inputs: int = 12) -> torch.Tensor:
    """Unit vectors."""
    return torch.eye(inputs)[list(numbers)]


def test_similarity_in_closed_form():
    same = similarity(rows(0, 1, 2), rows(0, 1, 2))
    assert np.allclose(same, 1)  # the smaller space lies in the larger one
    assert not similarity(rows(0, 1), rows(2, 3, 4)).any()
    shared = similarity(rows(0, 1), rows(0, 4, 5))  # the first direction alone
    assert shared.tolist() == [[1, 1, 1], [1, 0.5, 0.5]]
    later = similarity(rows(0, 1), rows(3, 1, 0))
    assert later.tolist() == [[0, 0, 1], [0, 0.5, 1]]
    assert np.allclose(similarity(-rows(0, 1), rows(1, 0)), [[0, 1], [1, 1]])  # the sign of a direction means nothing


def test_random_directions_have_what_chance_gives():
    """max(i, j) / inputs, on the mean of many."""
    draw = torch.Generator().manual_seed(0)
    grids = []
    for _ in range(200):
        one, other = (torch.linalg.qr(torch.randn(30, 5, generator=draw)).Q.T for _ in range(2))
        grids.append(similarity(one, other))
    expected = np.maximum(*np.ogrid[1:6, 1:6]) / 30
    assert np.abs(np.mean(grids, 0) - expected).max() < 0.02


def test_amplification_in_closed_form():
    """W = diag(8, 4, 2, 1): of its own first two directions, an update has the most there is."""
    W = torch.diag(own := torch.tensor([8.0, 4.0, 2.0, 1.0]))

    def of(factor: float, *directions: int) -> Any:
        return (
            rows(*directions, inputs=4).T,
            torch.tensor([factor, factor])[: len(directions)],
            rows(*directions, inputs=4),
        )

    top = amplified("x", of(3.0, 0, 1), W, own)
    assert top is not None
    assert top.by_update == top.by_weight == pytest.approx(math.hypot(8, 4))
    assert top.amplification == pytest.approx(3 * math.sqrt(2) / math.hypot(8, 4))
    assert top.by_random == pytest.approx(math.sqrt(85) * 2 / 4)
    last = amplified("x", of(3.0, 3), W, own)
    assert last is not None
    assert (last.rank, last.amplification) == (1, pytest.approx(3.0))
    assert amplified("x", of(0.0, 0), W, own) is None
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        U, V = (torch.linalg.qr(torch.randn(4, 2, generator=draw)).Q for _ in range(2))
        found.append(torch.linalg.vector_norm(U.T @ W @ V).item() ** 2)
    assert math.sqrt(np.mean(found)) == pytest.approx(top.by_random, rel=0.05)


def save(model: Any, folder: Path, base: Path) -> Path:
    folder.mkdir(parents=True)
    save_adapter(model, folder, find_base(str(base)), quantization="none", double_quantization=True)
    return folder


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_an_update_that_is_a_multiple_of_the_weights_own_directions(base: str, tmp_path: Path, request: Any):
    """ΔW = 2 · the three largest directions of W: it amplifies them by 2. GPT-2 stores its weights transposed."""
    folder = request.getfixturevalue(base)
    model = with_adapter(open_base(folder), "all-linear", rank=3, alpha=6.0)
    for layer in trained_modules(model).values():
        U, values, V = torch.linalg.svd(dense_weight(layer.base_layer).float(), full_matrices=False)
        layer.lora_A.data = V[:3].contiguous()
        layer.lora_B.data = U[:, :3] * values[:3]
    found = analyze([str(save(model, tmp_path / "adapter", folder))], None)
    (layers,) = found.amplified.values()
    assert len(layers) == len(trained_modules(model))
    for each in layers:
        assert each.rank == 3
        assert each.amplification == pytest.approx(2, rel=1e-4), each.layer
        assert each.by_update == pytest.approx(each.by_weight, rel=1e-2)  # found by random projection


def test_mixed_ranks_and_targets_share_what_they_share(tiny_llama: Path, tmp_path: Path, lora: Any):
    """The one's only direction is the other's first; k_proj is adapted by one alone."""
    one = with_adapter(open_base(tiny_llama), ["q_proj"], rank=1)
    other = with_adapter(open_base(tiny_llama), ["q_proj", "k_proj"], rank=4)
    for name, layer in trained_modules(one).items():
        A, B = rows(5, 6, 7, 8, inputs=64), torch.eye(64)[:, :4] * torch.tensor([9.0, 3.0, 2.0, 1.0])
        trained_modules(other)[name].lora_A.data, trained_modules(other)[name].lora_B.data = A, B
        layer.lora_A.data = A[:1].clone()
    adapters = [save(one, tmp_path / "one", tiny_llama), save(other, tmp_path / "other", tiny_llama)]
    place = tmp_path / "analysis"
    said = json.loads(lora("analyze", *adapters, "--output", place, "--json").out)
    (pair,) = said["similarity"]
    assert pair["adapters"] == ["one", "other"]
    assert [each["layer"] for each in pair["layers"]] == [f"model.layers.{at}.self_attn.q_proj" for at in (0, 1)]
    for each in pair["layers"]:
        assert each["update_first"] == each["update_all"] == pytest.approx(1)
        assert each["A_first_in_all"] == pytest.approx(1)
        assert each["random_all"] == 4 / 64
    assert np.shape(pair["grids"]["q_proj"]["update"]) == (1, 4)
    assert {name: len(each) for name, each in said["amplification"].items()} == {"one": 2, "other": 4}
    assert sorted(path.name for path in place.iterdir()) == [
        *("amplification-1.png", "amplification-2.png", "analysis.html", "analysis.json", "similarity-1.png")
    ]
    assert json.loads((place / "analysis.json").read_text())["similarity"] == said["similarity"]
    page = (place / "analysis.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "one and other" in page
    assert "the output already exists" in lora("analyze", *adapters, "--output", place).error


def test_adapters_of_one_name_and_one_called_random_are_told_apart(tiny_llama: Path, tmp_path: Path, lora: Any):
    places = [tmp_path / "1" / "random", tmp_path / "2" / "random", tmp_path / "3" / "random (1)"]
    for place in places:
        place.parent.mkdir()
        save(with_adapter(open_base(tiny_llama), ["q_proj"]), place, tiny_llama)
    said = json.loads(lora("analyze", *places, "--json").out)
    assert len(set(said["adapters"])) == len(said["amplification"]) == 3
    assert len(said["similarity"]) == 3
    for pair in said["similarity"]:
        assert pair["layers"][0]["update_all"] == pytest.approx(1)  # the same adapter, and nothing drawn at random
    alone = json.loads(lora("analyze", places[0], "--json").out)
    assert alone["similarity"][0]["layers"][0]["update_all"] < 1


def test_one_adapter_is_compared_with_a_random_one(tiny_llama: Path, tmp_path: Path, lora: Any):
    folder = save(with_adapter(open_base(tiny_llama), "all-linear"), tmp_path / "<b>one", tiny_llama)
    said = lora("analyze", folder, "--output", tmp_path / "analysis")
    assert said.code == 0, said.text
    assert "<b>one and random" in said.out
    assert "<b>one" not in (tmp_path / "analysis" / "analysis.html").read_text()
    document = json.loads(lora("analyze", folder, "--json").out)
    found = [each["update_all"] / each["random_all"] for each in document["similarity"][0]["layers"]]
    assert 0.5 < np.mean(found) < 2


def test_other_bases_and_other_kinds_are_refused(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, lora: Any):
    one = save(with_adapter(open_base(tiny_llama)), tmp_path / "one", tiny_llama)
    other = save(with_adapter(open_base(tiny_gpt2)), tmp_path / "other", tiny_gpt2)
    assert "other is for another base model than one" in lora("analyze", one, other).error
    assert "one was trained on another base model" in lora("analyze", one, "--base", tiny_gpt2).error
    apart = save(with_adapter(open_base(tiny_llama), ["v_proj"]), tmp_path / "apart", tiny_llama)
    said = lora("analyze", save(with_adapter(open_base(tiny_llama), ["q_proj"]), tmp_path / "q", tiny_llama), apart)
    assert "no layer in common" in said.error
    stored = {"a.weight": None}
    assert weight_beside(find_base(str(tiny_llama)), stored, "b", (2, 2)) is None  # type: ignore[arg-type]
