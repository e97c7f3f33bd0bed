"""The contract of what is trained: everything around adapters works with any kind that keeps it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_adapter
from torch import Tensor, nn
from torch.testing import assert_close

import lora_cli
from lora_cli.adapters.attach import attach, leave_out
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import Target
from lora_cli.adapters.trained import (
    ALL,
    Trained,
    adapters_disabled,
    cast_once,
    is_neutral,
    load_state,
    parameters_by_group,
    state_of,
    trained_modules,
    trained_parameters,
)
from lora_cli.adapters.update_size import update_sizes
from lora_cli.recipe import TrainRecipe
from lora_cli.training.checkpoint import load_checkpoint, save_checkpoint, verify
from lora_cli.training.optimizer import make_optimizer, set_learning_rate
from lora_cli.training.state import State

PACKAGE = Path(lora_cli.__file__).parent


class Scaled(Trained):
    """Another kind: each output of the base layer times 1 + its own trained number; not additive in x, nor low-rank."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.gain = nn.Parameter(torch.zeros(base_layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        return base * (1 + self.gain) if self.active else base

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        return {"A": [self.gain]}

    def is_neutral(self) -> bool:
        return not bool(self.gain.any())

    def merged(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return weight.float() * (1 + self.gain[rows]).unsqueeze(1)

    def to_peft(self, alpha: float) -> dict[str, Tensor]:
        return {"gain": self.state()["gain"] / alpha}

    def from_peft(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        return {"gain": tensors["gain"] * alpha}

    @classmethod
    def of_peft(cls, name: str, tensors: Mapping[str, Tensor], alpha: float, config: Mapping[str, Any]) -> Any:
        return name

    @classmethod
    def misfit(cls, base_layer: nn.Module | None, tensors: Mapping[str, Tensor]) -> str | None:
        return None


def mixed(*, random: bool = True) -> nn.Module:
    """Three layers of which the first is adapted by LoRA with a mask, the last scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    mask = torch.arange(16 * 3).view(16, 3) % 3 > 0
    attach(model, [Target("0", 3, 5.0, mask)])
    model[2] = Scaled(model[2])  # type: ignore[arg-type]
    if random:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


def test_only_the_adapters_room_knows_what_an_adapter_is_made_of():
    """Names of LoRA's matrices, in code or in strings, outside lora_cli/adapters/; docstrings may speak of them.

    The equalities are about these matrices: `lora selftest` measures a layer against its formula and PEFT's.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "adapters" or path.name in ("equalities.py", "selftest.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        names += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        forbidden = ("lora_A", "lora_B", "LoRALinear", "delta_weight")
        found += [
            f"{path.relative_to(PACKAGE)}: {name[:60]}" for name in names if any(each in name for each in forbidden)
        ]
    assert found == []


def test_state_and_load_are_inverse_bit_for_bit_and_change_nothing_else():
    model, other = mixed(), mixed(random=False)
    assert is_neutral(other)
    assert not is_neutral(model)
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    assert list(state) == ["0.lora_A", "0.lora_B", "2.gain"]
    load_state(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(other).items())
    assert torch.equal(model(X), other(X))


def test_the_merged_weights_compute_what_the_modules_compute():
    model = mixed()
    plain = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        for name, module in trained_modules(model).items():
            weight: Any = module.base_layer.weight
            plain.get_submodule(name).weight.copy_(module.merged(weight))  # type: ignore[operator, union-attr]
    assert_close(plain(X), model(X), rtol=0, atol=1e-5)  # measured 1e-6
    with adapters_disabled(model):
        base = leave_out_all(mixed())
        assert torch.equal(model(X), base(X))


def leave_out_all(model: nn.Module) -> nn.Module:
    assert leave_out(model, list(trained_modules(model))) == {}
    return model


def test_the_size_of_an_update_is_measured_for_every_kind():
    model = mixed()
    for name, size in update_sizes(trained_modules(model)).items():
        module: Any = model.get_submodule(name)
        weight = module.base_layer.weight
        assert size.update == pytest.approx((module.merged(weight) - weight).norm().item(), rel=1e-5)
        assert size.weight == pytest.approx(weight.norm().item(), rel=1e-5)


def test_a_file_with_another_alpha_means_the_same_module():
    model, other = mixed(), mixed(random=False)
    for name, module in trained_modules(model).items():
        stored = module.to_peft(7.0)
        twin = trained_modules(other)[name]
        twin.load(twin.from_peft(stored, 7.0))
    assert_close(other(X), model(X), rtol=1e-6, atol=1e-6)  # B is scaled and scaled back in fp64


def test_the_optimizer_gives_each_group_its_rate_and_trains_all_of_it():
    model = mixed()
    assert [len(group) for group in parameters_by_group(model).values()] == [2, 1]
    before = {name: tensor.clone() for name, tensor in state_of(model).items()}
    optimizer = make_optimizer(TrainRecipe(lora_plus_ratio=8.0), model)
    set_learning_rate(optimizer, 0.001)
    model(X).square().sum().backward()
    optimizer.step()
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in state_of(model).items()}
    assert moved == pytest.approx({"0.lora_A": 0.001, "0.lora_B": 0.008, "2.gain": 0.001}, rel=1e-3)


def test_a_checkpoint_holds_and_restores_every_kind(tmp_path):
    model, other = mixed(), mixed(random=False)
    optimizer = make_optimizer(TrainRecipe(), model)
    model(X).square().sum().backward()
    optimizer.step()
    values: dict[str, Any] = {"belongs_to": {}, "schedule": {}, "lines": []}
    save_checkpoint(tmp_path / "step_000001", model, optimizer, State(step=1), **values)
    verify(tmp_path / "step_000001")
    again = make_optimizer(TrainRecipe(), other)
    load_checkpoint(tmp_path / "step_000001", other, again)
    assert torch.equal(model(X), other(X))
    for one, two in zip(trained_parameters(model), trained_parameters(other), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], again.state[two]["exp_avg"])


def test_casting_once_changes_nothing_and_ends_with_its_block():
    model = mixed().to(torch.bfloat16)
    layer: Any = model[0]
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = X.to(torch.bfloat16)
    expected = model(x)
    with cast_once(trained_modules(model), torch.bfloat16):
        assert layer.low_precision is not None
        assert torch.equal(model(x), expected)
    assert layer.low_precision is None


def test_a_trained_module_takes_the_mode_of_the_layer_that_it_wraps():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    attach(model, [Target("0", 2, 2.0)], dropout=0.5)
    randomize_adapter(model)
    layer: Any = model[0]
    assert isinstance(layer, LoRALinear)
    assert not layer.training
    assert not layer.base_layer.training
