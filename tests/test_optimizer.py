"""Optimizers against those they stand for, from the same gradients, and what they hold and ship."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import losses, randomize_adapter
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.testing import assert_close

from lora_cli.adapters.attach import attach
from lora_cli.adapters.targets import Target
from lora_cli.adapters.trained import trained_modules, trained_parameters
from lora_cli.evaluation.evaluate import evaluate_run
from lora_cli.recipe import TrainRecipe
from lora_cli.training import loop
from lora_cli.training.optimizer import averaged_weights, make_optimizer, set_learning_rate

MOMENTS = {  # the tensors an optimizer keeps for each A and B, in their shape
    "adamw": {"exp_avg", "exp_avg_sq"},
    "adamw_8bit": {"state1", "state2"},
    "paged_adamw": {"state1", "state2"},
    "paged_adamw_8bit": {"state1", "state2"},
    "schedule_free_adamw": {"exp_avg_sq", "z"},
}
WIDE = 96  # with rank 64, A and B have more than the 4096 values below which bitsandbytes keeps 32 bits


def adapted(rank: int = 4) -> nn.Module:
    """Two linear layers with adapters of random A and B."""
    model = nn.Sequential(nn.Linear(WIDE, 80), nn.Linear(80, WIDE))
    attach(model, [Target(name, rank, 2.0 * rank) for name in ("0", "1")])
    randomize_adapter(model)
    return model


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# ── what an optimizer holds ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MOMENTS)
def test_states_are_those_of_A_and_B_alone(name):
    model = adapted(rank=64)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of the frozen ones too, as a wrong freeze would give them
    optimizer = make_optimizer(TrainRecipe(optimizer=name), model)
    optimizer.step()
    wanted = trained_parameters(model)
    assert len(optimizer.state) == len(wanted) == 4
    for parameter in wanted:
        state = optimizer.state[parameter]
        assert {key for key, value in state.items() if getattr(value, "shape", None) == parameter.shape} == MOMENTS[
            name
        ]
        if name.endswith("8bit"):
            assert {state[key].dtype for key in MOMENTS[name]} == {torch.uint8}
        rest = sum(value.numel() for key, value in state.items() if key not in MOMENTS[name] and torch.is_tensor(value))
        assert rest <= 2 * 256 + 2 * math.ceil(parameter.numel() / 256)  # bitsandbytes' code tables and block scales


def test_a_checkpoint_holds_states_of_A_and_B_alone(run_recipe):
    run, _ = run_recipe()
    stored = load_file(run / "checkpoints" / "step_000004" / "optimizer.safetensors")
    adapter = load_file(run / "checkpoints" / "step_000004" / "adapter.safetensors")
    for moment in MOMENTS["adamw"]:
        shapes = sorted(tensor.shape for name, tensor in stored.items() if name.endswith(f"/{moment}"))
        assert shapes == sorted(tensor.shape for tensor in adapter.values())
    assert len(stored) == 3 * len(adapter)  # two moments and the count of steps


def test_adamw_is_one_kernel_and_gives_what_the_plain_loop_gives():
    ours, plain = adapted(), adapted()
    optimizer = make_optimizer(TrainRecipe(weight_decay=0.1, learning_rate=0.01), ours)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    reference = torch.optim.AdamW(trained_parameters(plain), lr=0.01, weight_decay=0.1, foreach=False)
    for step in range(10):
        for model, stepped in [(ours, optimizer), (plain, reference)]:
            give_gradients(trained_parameters(model), step)
            stepped.step()
    for one, other in zip(trained_parameters(ours), trained_parameters(plain), strict=True):
        assert_close(one, other, rtol=0, atol=1e-6)  # the same formula, rounded in another order; measured 1e-8


# ── LoRA+ ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MOMENTS)
def test_the_first_step_moves_B_by_the_ratio_further_than_A(name):
    """Adam's first step is the rate times the sign of the gradient, whatever its size."""
    model = adapted()
    before = [parameter.detach().clone() for parameter in trained_parameters(model)]
    optimizer = make_optimizer(TrainRecipe(optimizer=name, lora_plus_ratio=8.0), model)
    give_gradients(trained_parameters(model), 0)
    signs = [parameter.grad.sign() for parameter in trained_parameters(model)]  # type: ignore[union-attr]
    set_learning_rate(optimizer, 0.001)
    optimizer.step()
    with averaged_weights(optimizer):
        for at, (parameter, old, sign) in enumerate(zip(trained_parameters(model), before, signs, strict=True)):
            rate = 0.001 if at % 2 == 0 else 0.008  # A and B take turns
            assert_close(parameter.detach(), old - rate * sign, rtol=0, atol=2e-6)  # Adam's 1e-8 below a small gradient


def test_lora_plus_is_what_peft_does():
    ours = adapted()
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(WIDE, 80), nn.Linear(80, WIDE)),  # type: ignore[arg-type]
        peft.LoraConfig(r=4, target_modules=["0", "1"]),
    )
    pairs = []
    for name, layer in trained_modules(ours).items():
        other: Any = theirs.base_model.model.get_submodule(name)
        pairs += [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)]
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    optimizer = make_optimizer(TrainRecipe(lora_plus_ratio=16.0, weight_decay=0.1), ours)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    falling = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 - step / 10)
    for step in range(10):
        give_gradients([own for own, _ in pairs], step)
        give_gradients([other for _, other in pairs], step)
        set_learning_rate(optimizer, 0.01 * (1 - step / 10))
        optimizer.step()
        reference.step()
        falling.step()
    for own, other in pairs:
        assert_close(own, other, rtol=0, atol=1e-6)  # fused against a loop; values are near 1


# ── whole runs, replayed from their gradients ───────────────────────────────────────────────────────────────────


class Replay:
    """A and B before the first step of a run, and their gradients at each, as the optimizer was given them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.start: dict[str, Tensor] = {}
        self.gradients: list[dict[str, Tensor]] = []
        real = loop.Run._optimize

        def optimize(run: Any, step: int) -> Any:
            parameters = {
                f"base_model.model.{name}.{part}.weight": getattr(layer, part)
                for name, layer in trained_modules(run.session.model).items()
                for part in ("lora_A", "lora_B")
            }
            if step == 1:
                self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            step_optimizer = run.optimizer.step

            def record_and_step() -> None:
                self.gradients.append({name: each.grad.clone() for name, each in parameters.items()})
                step_optimizer()

            with monkeypatch.context() as patch:
                patch.setattr(run.optimizer, "step", record_and_step)
                return real(run, step)

        monkeypatch.setattr(loop.Run, "_optimize", optimize)

    def through(
        self, make: Callable[[list[Any]], Any], before_step: Callable[[Any, int], None] = lambda *_: None
    ) -> tuple[dict[str, Tensor], Any]:
        """A and B after all steps of the optimizer that `make` gives for the groups of A and B, and that optimizer."""
        parameters = {name: nn.Parameter(value.clone()) for name, value in self.start.items()}
        groups = [[each for name, each in parameters.items() if f".{part}." in name] for part in ("lora_A", "lora_B")]
        optimizer = make(groups)
        for step, gradients in enumerate(self.gradients, start=1):
            before_step(optimizer, step)
            for name, gradient in gradients.items():
                parameters[name].grad = gradient.clone()
            optimizer.step()
        return {name: parameter.detach() for name, parameter in parameters.items()}, optimizer


def shipped(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_with_lora_plus_gives_B_its_multiple_of_every_rate(run_recipe, monkeypatch):
    replay = Replay(monkeypatch)
    own = {"lora_plus_ratio": 4.0, "schedule": "linear", "warmup_ratio": 0.25, "max_steps": 8}
    run, _ = run_recipe(train=own)
    rates = [0.5, 1.0, 1.0, *(1 - past / 6 for past in range(1, 6))]  # of 0.01, in closed form

    def schedule(optimizer: Any, step: int) -> None:
        for group, ratio in zip(optimizer.param_groups, (1.0, 4.0), strict=True):
            group["lr"] = 0.01 * ratio * rates[step - 1]

    expected, _ = replay.through(
        lambda groups: torch.optim.AdamW([{"params": each} for each in groups], weight_decay=0.0), schedule
    )
    stored = shipped(run / "adapter")
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert_close(tensor, expected[name], rtol=0, atol=1e-6)  # fused against a loop


def test_a_schedule_free_run_ships_the_average_of_the_library(run_recipe, tiny_gpt2, monkeypatch):
    """With the library's own warm-up, and evaluating twice in between."""
    replay = Replay(monkeypatch)
    own = {"optimizer": "schedule_free_adamw", "warmup_ratio": 0.25, "weight_decay": 0.1, "max_steps": 8}
    run, _ = run_recipe(base_model=str(tiny_gpt2), data={"validation": 0.25}, train=own | {"eval_every": 3})

    def library(groups: list[Any]) -> Any:
        optimizer = AdamWScheduleFree([{"params": each} for each in groups], lr=0.01, weight_decay=0.1, warmup_steps=2)
        optimizer.train()
        return optimizer

    expected, optimizer = replay.through(library)
    in_training = load_file(run / "checkpoints" / "step_000008" / "adapter.safetensors")
    for name, tensor in in_training.items():
        assert torch.equal(tensor, expected[f"base_model.model.{name}.weight"])
    optimizer.eval()  # in place: `expected` is the average from here on
    stored = shipped(run / "adapter_last")
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name])
    away = [(in_training[name] - stored[f"base_model.model.{name}.weight"]).abs().max() for name in in_training]
    assert max(away) > 1e-3  # or else shipping the weights in training would do as well


def test_the_validation_loss_of_a_schedule_free_run_is_that_of_what_it_ships(run_recipe):
    own = {"optimizer": "schedule_free_adamw", "max_steps": 8}
    run, report = run_recipe(data={"validation": 0.25}, train=own)
    assert losses(run)[-1] < losses(run)[0] - 0.2
    again = evaluate_run(run, None)["adapter"].loss
    assert again == pytest.approx(report["last_validation_loss"], abs=1e-6)
    assert report["best_step"] == 8
    for name, tensor in shipped(run / "adapter").items():
        assert torch.equal(tensor, shipped(run / "adapter_last")[name])


def test_the_averaged_weights_leave_those_in_training_as_they_were():
    """Bitwise, also when asked for twice, and when what is done inside fails."""
    model = adapted()
    optimizer = make_optimizer(TrainRecipe(optimizer="schedule_free_adamw", learning_rate=0.1), model)
    for step in range(3):
        give_gradients(trained_parameters(model), step)
        optimizer.step()

    def now() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in trained_parameters(model)]

    def equal(some: list[Tensor], others: list[Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))

    before = now()

    def save_on_a_full_disk() -> None:
        with averaged_weights(optimizer):
            average = now()
            assert not equal(average, before)
            for _ in range(2):
                with averaged_weights(optimizer):
                    assert equal(now(), average)
            raise OSError("full disk")

    with pytest.raises(OSError, match="full disk"):
        save_on_a_full_disk()
    assert equal(now(), before)
    give_gradients(trained_parameters(model), 3)
    optimizer.step()  # the library refuses this where its optimizer was left evaluating
