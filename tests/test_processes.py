"""Several processes: the same run as one (E4), a base in shares, checkpoints of any number, a process that is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, adapter_tensors, losses, quiet_console, randomize_adapter
from test_architectures import ARCHITECTURES
from test_gguf import write_gguf
from torch import Tensor, nn

from lora_cli.adapters.trained import trained_parameters
from lora_cli.errors import LoraError, ProcessLost
from lora_cli.recipe import load_recipe
from lora_cli.training import micro_batches
from lora_cli.training.micro_batches import MicroBatches
from lora_cli.training.opening import open_session
from lora_cli.training.processes import is_lost_process, process_lost_errors
from lora_cli.training.run_folder import read_samples
from lora_cli.training.train import train

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
# With --cpu accelerate starts one process whatever is asked for; this starts several, which find no GPU
ACCELERATE = [
    *["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"],
]
# Trains one recipe after another, because starting Python costs more than they do; notes what each process holds
TRAIN_ALL = """
import json, os, sys
from pathlib import Path
import torch
from rich.console import Console
from lora_cli.base.linear import held_bytes
from lora_cli.base.load import quiet_libraries
from lora_cli.recipe import load_recipe
from lora_cli.training import micro_batches, passes
from lora_cli.training.train import train
quiet_libraries()
torch.set_num_threads(1)
spread, shares, run = passes.shard_base, [], micro_batches.MicroBatches.run
class Stopped(Exception):
    pass
def stops(runner, step, *rest):
    if step == 3 and "stops" in runner.session.recipe.output and not runner.resumed:
        raise Stopped
    return run(runner, step, *rest)
micro_batches.MicroBatches.run = stops
def noted(model, *rest):
    whole = held_bytes(model, frozen_alone=True)
    spread(model, *rest)
    shares.append((held_bytes(model, frozen_alone=True), whole))
passes.shard_base = noted
for path in sys.argv[1:]:
    recipe = load_recipe(Path(path))
    micro_batches.MicroBatches.resumed = resume = Path(recipe.output, "metrics.jsonl").exists()
    try:
        train(recipe, Console(quiet=True), resume=resume)
    except Stopped:
        continue
    if recipe.train.shard_base:
        note = Path(recipe.output) / f"share-{os.environ['RANK']}.json"
        note.write_text(json.dumps(shares[-1]))
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # torch's threads abort now and then where they are taken down ("terminate called …")
"""
STEPS = {"gradient_accumulation_steps": 5, "max_steps": 3, "micro_batch_size": 1}  # 5: one process has a pass more
SHARED = {"adapter": {"dropout": 0.2}, "data": {"validation": 0.2}, "device": "cpu"}
KINDS: dict[str, dict[str, Any]] = {  # a Llama with RMSNorm, gated products and an output head of its own; GPT-2 tied
    "llama": {},
    "llama-nf4": {"quantization": "nf4"},
    "llama-recomputed": {"train": {"gradient_checkpointing": "full", "eval_every": 1}},
    "llama-last-block": {"adapter": {"layers": [-1]}},  # the first block then has no backward pass
    "llama-int4": {"quantization": "int4"},
    "llama-q8_0": {"base_model": "q8_0.gguf", "quantization": "gguf"},
    "gpt2": {"base_model": "tiny-gpt2"},
    "gpt2-nf4": {"base_model": "tiny-gpt2", "quantization": "nf4", "double_quantization": False},
}


def launch(launcher: list[str], processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    searched = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": searched}
    command = [sys.executable, "-m", *launcher, str(processes), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)


@pytest.fixture
def write(recipe_file: Callable[..., Path], tmp_path: Path, tiny_gpt2: Path, tiny_llama: Path) -> Callable[..., Path]:
    """Writes a recipe of KINDS under a name, which is also that of its run folder."""

    def write(name: str, kind: str, **train: Any) -> Path:
        settings: dict[str, Any] = {"train": STEPS}
        for key, value in [*SHARED.items(), *KINDS[kind].items(), ("train", train)]:
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
        if settings.get("base_model") == "tiny-gpt2":
            settings["base_model"] = str(tiny_gpt2)
        if settings.get("base_model") == "q8_0.gguf":
            file = tmp_path / "q8_0.gguf"
            settings["base_model"] = str(file if file.exists() else write_gguf(file, tiny_llama, "Q8_0"))
        return recipe_file(f"{name}.yaml", **settings, output=str(tmp_path / name))

    return write


@pytest.fixture
def train_all(tmp_path: Path) -> Callable[..., None]:
    """Trains recipes one after another on a number of processes; resumes those that have begun."""

    def run(launcher: list[str], processes: int, recipes: list[Path]) -> None:
        script = tmp_path / "train_all.py"
        script.write_text(TRAIN_ALL)
        done = launch(launcher, processes, str(script), *map(str, recipes))
        assert done.returncode == 0, done.stderr

    return run


def train_here(recipe: Path, **options: Any) -> Path:
    loaded = load_recipe(recipe)
    train(loaded, quiet_console(), **options)
    return Path(loaded.output)


def validation(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    assert len(losses(one)) == len(losses(other)) == STEPS["max_steps"], "one process writes"
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)  # E4; fp32 sums in another order
    assert validation(one) == pytest.approx(validation(other), abs=1e-5)
    assert any(bool(tensor.any()) for name, tensor in adapter_tensors(one).items() if "lora_B" in name)


def assert_shares(run: Path, processes: int) -> None:
    """Each process holds its share; a little more, because the scales of 4-bit weights stay whole."""
    for rank in range(processes):
        mine, whole = json.loads((run / f"share-{rank}.json").read_text())
        assert 1 / processes <= mine / whole < 1 / processes + 0.05


# ── the same run on any number of processes ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kinds",
    [
        ("llama", "gpt2-nf4"),
        pytest.param(("llama-nf4", "llama-recomputed", "llama-last-block", "gpt2"), marks=pytest.mark.slow),
        pytest.param(("llama-int4", "llama-q8_0"), marks=pytest.mark.slow),
    ],
)
def test_a_base_in_shares_is_the_base(write, train_all, tmp_path, kinds):
    """Sharded on 2 = whole on 2, bit for bit; = 1 process within 1e-5, on a number of passes that 2 does not divide."""
    whole = [write(f"{kind}-whole", kind) for kind in kinds]
    shared = [write(f"{kind}-shared", kind, shard_base=True) for kind in kinds]
    train_all(TORCHRUN, 2, [*whole, *shared])
    for kind in kinds:
        on_two, in_shares = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-shared"
        assert losses(in_shares) == losses(on_two)
        assert validation(in_shares) == validation(on_two)
        found, expected = adapter_tensors(in_shares), adapter_tensors(on_two)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert_shares(in_shares, 2)
        assert_same_run(in_shares, train_here(write(f"{kind}-alone", kind)))


@pytest.mark.slow
def test_accelerate_launch_is_the_same_and_checkpoints_go_from_any_number_to_any(
    write, train_all, tmp_path, monkeypatch
):
    """Begun on 2 and ended on 1, begun on 1 and ended on 2, stopped and resumed in shares: as if never interrupted."""
    straight = train_here(write("straight", "llama-nf4"))
    stopped = {
        name: write(name, "llama-nf4", checkpoint_every=1, shard_base="shares" in name)
        for name in ("stops-on-one", "stops-on-two", "stops-in-shares")
    }
    stop_here_at_step_three(stopped["stops-on-one"], monkeypatch)
    train_all(
        ACCELERATE,
        2,
        [
            write("launched", "llama-nf4", sample_every=2),
            stopped["stops-on-one"],
            stopped["stops-on-two"],
            *[stopped["stops-in-shares"]] * 2,
        ],
    )
    assert len(losses(tmp_path / "stops-on-two")) == 2
    train_here(stopped["stops-on-two"], resume=True)
    for name in ("launched", *stopped):
        assert_same_run(tmp_path / name, straight)
    assert json.loads((tmp_path / "launched" / "environment.json").read_text())["processes"] == 2
    samples = [(each.step, each.number) for each in read_samples(tmp_path / "launched" / "samples.jsonl")]
    assert samples == [(step, number) for step in (0, 2, 3) for number in (1, 2, 3)], "of one process, and no other"


def stop_here_at_step_three(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MicroBatches.run

    def stops(runner: MicroBatches, step: int, *rest: Any) -> float:
        if step == 3:
            raise KeyError("stopped")
        return run(runner, step, *rest)

    monkeypatch.setattr(MicroBatches, "run", stops)
    with pytest.raises(KeyError, match="stopped"):
        train_here(recipe)
    monkeypatch.setattr(MicroBatches, "run", run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_four_processes_are_one(write, train_all, tmp_path, launcher):
    """4 do not divide 5 pieces, nor 2 blocks of 64 rows evenly every weight; one run is resumed where 2 left it."""
    kinds = ("llama-nf4", "gpt2")
    whole = [write(f"{kind}-whole", kind) for kind in kinds]
    shared = [write(f"{kind}-shared", kind, shard_base=True) for kind in kinds]
    stopped = write("stops", "llama-nf4", checkpoint_every=1, shard_base=True)
    train_all(launcher, 2, [stopped])
    assert len(losses(tmp_path / "stops")) == 2
    train_all(launcher, 4, [*whole, *shared, stopped])
    for kind in kinds:
        alone = train_here(write(f"{kind}-alone", kind))
        for name in ("whole", "shared"):
            assert_same_run(tmp_path / f"{kind}-{name}", alone)
        assert_shares(tmp_path / f"{kind}-shared", 4)
    assert_same_run(tmp_path / "stops", tmp_path / "llama-nf4-alone")


# ── every architecture ──────────────────────────────────────────────────────────────────────────────────────────

SPREAD_ALL = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
state = PartialState(cpu=True)
from test_architectures import ARCHITECTURES, CPU, adapted, batch_of, examples, gradients
from tiny_model import make_tokenizer, save_tiny
from lora_cli.adapters.trained import trained_parameters
from lora_cli.adapters.targets import block_lists
from lora_cli.base.activations import ActivationPlan
from lora_cli.base.load import load_model, quiet_libraries
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.sharding import shard_base
from lora_cli.base.source import find_base
from lora_cli.evaluation.loss import summed_loss
quiet_libraries()
torch.set_num_threads(1)
def passes(model, batch):
    losses = []
    for _ in range(2):  # what comes and goes must come again
        loss = summed_loss(model.train(), batch)
        losses.append(loss.item())
        loss.backward()
        grown = gradients(model)
        with torch.no_grad():
            losses.append(summed_loss(model.eval(), batch).item())
    return losses, grown
for name, architecture in ARCHITECTURES.items():
    with state.main_process_first():
        place = Path(sys.argv[1]) / name
        if state.is_main_process:
            save_tiny(architecture.config(), place, tokenizer=make_tokenizer())
    for quantization in ("none", "nf4", "int4"):
        model = adapted(load_model(find_base(str(place)), quantization=quantization, dtype=torch.float32, device=CPU))
        blocks = [block for each in block_lists(model) for block in model.get_submodule(each)]
        save_only_inputs(model)
        first = tuple(at == 0 for at in range(len(blocks)))
        ActivationPlan(first, (1.0,) * len(blocks), 1.0).apply(blocks)
        batch = batch_of(examples(9, 12, 5), packed=architecture.packs)
        torch.manual_seed(0)
        expected = passes(model, batch)
        shard_base(model, blocks, trained_parameters(model), CPU)
        torch.manual_seed(0)
        found = passes(model, batch)
        assert found[0] == expected[0], (name, quantization, found[0], expected[0])
        assert found[1].keys() == expected[1].keys() and found[1]
        assert all(torch.equal(found[1][key], expected[1][key]) for key in found[1]), (name, quantization)
        assert any(bool(gradient.any()) for gradient in found[1].values())
        if state.is_main_process:
            print("spread", name, quantization, flush=True)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # torch's threads abort now and then where they are taken down ("terminate called …")
"""


@pytest.mark.slow
def test_every_architecture_in_shares_is_itself(tmp_path):
    """Losses and gradients, bit for bit, twice, training and evaluating, a block recomputed; in fp32, NF4 and int4."""
    (tmp_path / "spread_all.py").write_text(SPREAD_ALL)
    done = launch(TORCHRUN, 2, str(tmp_path / "spread_all.py"), str(tmp_path / "models"))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ARCHITECTURES:
        for quantization in ("none", "nf4", "int4"):
            assert f"spread {name} {quantization}\n" in done.stdout


# ── what a base in shares cannot do ─────────────────────────────────────────────────────────────────────────────


def test_one_process_has_nobody_to_share_with(write):
    with pytest.raises(LoraError, match="spreads the base model over several processes, but this is a single one"):
        train_here(write("alone", "llama", shard_base=True))


def test_a_pass_that_keeps_company_changes_no_gradient(recipe_file, monkeypatch):
    """Bit for bit, also where the pass itself would give something that is no number."""
    session = open_session(load_recipe(recipe_file(adapter={"dropout": 0.2})), quiet_console())
    randomize_adapter(session.model)
    runner = MicroBatches(
        session, Accelerator(cpu=True), trained_parameters(session.model), torch.amp.GradScaler("cpu", enabled=False)
    )
    batches = session.feed.step(1)
    alone, _ = runner.run(1, batches, 10.0, 1)
    expected = [parameter.grad.clone() for parameter in runner.parameters if parameter.grad is not None]
    assert len(expected) == len(runner.parameters)
    assert all(bool(gradient.any()) for gradient in expected)
    runner._dummy_pass(batches[0], 1, 7, 10.0)
    assert all(p.grad is not None and torch.equal(p.grad, e) for p, e in zip(runner.parameters, expected, strict=True))
    monkeypatch.setattr(micro_batches, "training_loss", with_loss_of(float("nan")))
    runner._dummy_pass(batches[0], 1, 7, 10.0)
    assert all(p.grad is not None and torch.equal(p.grad, e) for p, e in zip(runner.parameters, expected, strict=True))
    assert alone > 0


def with_loss_of(factor: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    real = micro_batches.training_loss

    def loss(*given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        minimized, cross_entropy = real(*given, **more)
        return minimized * factor, cross_entropy * factor

    return loss


def test_out_of_memory_with_shares_is_an_error_and_not_another_split(recipe_file, monkeypatch):
    session = open_session(load_recipe(recipe_file()), quiet_console())
    runner = MicroBatches(
        session, Accelerator(cpu=True), trained_parameters(session.model), torch.amp.GradScaler("cpu", enabled=False)
    )
    runner.recipe = runner.recipe.model_copy(update={"shard_base": True})

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(micro_batches, "training_loss", full)
    with pytest.raises(LoraError, match=r"a micro-batch of \d+ tokens does not fit .*cannot be cut smaller") as error:
        runner.run(1, session.feed.step(1), 10.0, 1)
    assert "gradient_checkpointing" in (error.value.fix or "")


# ── a process that is gone ──────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
from lora_cli.training import micro_batches
real = micro_batches.MicroBatches._forward_backward
def killed(runner, piece, step, *rest):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(runner, piece, step, *rest)
micro_batches.MicroBatches._forward_backward = killed
sys.argv = ["lora", "train", *sys.argv[1:]]
from lora_cli.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shares"])
def test_a_killed_worker_ends_the_run_with_a_clear_error_and_resume_completes_it(write, tmp_path, shared):
    recipe = write("killed", "llama-nf4", checkpoint_every=1, shard_base=shared)
    (tmp_path / "killed.py").write_text(KILLED)
    done = launch(TORCHRUN, 2, str(tmp_path / "killed.py"), str(recipe))
    assert done.returncode == 1
    assert "error: another process of this run ended, so this one cannot go on" in done.stderr
    assert "--resume" in done.stderr
    assert "lora_cli/" not in done.stderr.split("error: another process")[1], (
        "no traceback of ours; torchrun has its own"
    )
    assert len(losses(tmp_path / "killed")) == 2
    done = launch(TORCHRUN, 2, "-m", "lora_cli", "train", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "killed", train_here(write("straight", "llama-nf4", checkpoint_every=1)))


@pytest.mark.parametrize(
    "said",
    [
        "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38307. This is typically caused",
        "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:8582: Connection reset by peer",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "failed to recv, got 0 bytes: TCPStore",
        "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.27",
        "[Rank 0] Watchdog caught collective operation timeout: ProcessGroupNCCL timed out after 600000 ms",
    ],
)
def test_what_the_libraries_say_of_a_lost_process_becomes_an_error_of_ours(said):
    with pytest.raises(ProcessLost, match="another process of this run ended") as error, process_lost_errors("lora x"):
        raise RuntimeError(said)
    assert error.value.exit_code == 1
    assert error.value.fix is not None
    assert error.value.fix.endswith("continue with: lora x")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("the data server said: connection reset by peer"),
        torch.OutOfMemoryError("CUDA out of memory"),
        BrokenPipeError("[Errno 32] Broken pipe"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not isinstance(error, RuntimeError) or not is_lost_process(error)
    with pytest.raises(type(error)) as found, process_lost_errors("lora x"):
        raise error
    assert found.value is error


def test_all_gradients_are_summed_in_one_exchange():
    """An adapter is hundreds of small tensors: one exchange each would wait as often for the slowest process."""
    sent: list[Tensor] = []

    def reduce(value: Tensor, how: str) -> Tensor:
        assert how == "sum"
        sent.append(value)
        return value * 3

    accelerator: Any = SimpleNamespace(num_processes=3, device=torch.device("cpu"), reduce=reduce)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (4,), (1, 5)]]
    expected = []
    for at, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at))
        expected.append(parameter.grad * 3)
    micro = MicroBatches.__new__(MicroBatches)
    micro.accelerator, micro.parameters = accelerator, parameters
    micro._add_gradients()
    assert [each.numel() for each in sent] == [15]
    for parameter, gradient in zip(parameters, [*expected, torch.zeros(1, 5)], strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
