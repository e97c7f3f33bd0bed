"""`lora sweep`: every point is the run that `lora train` makes of its recipe, on one base and one preparation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import quiet_console, refusal, write_rows

from lora_cli.base import kept
from lora_cli.errors import Interrupted
from lora_cli.evaluation.gain import paired_gain
from lora_cli.recipe import load_recipe
from lora_cli.studies import halving, sweep_words
from lora_cli.studies import sweep as sweeping
from lora_cli.studies.halving import how_many
from lora_cli.studies.sweep import Sweep, axes_of, sweep
from lora_cli.studies.sweep_result import Point, recommendation
from lora_cli.training.checkpoint import read_losses
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.train import train

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_words, "picture", lambda *_: None)


@pytest.fixture
def recipe(recipe_file: Any) -> Path:
    return recipe_file(data={"validation": 0.25}, adapter={"dropout": 0.1}, train={"max_steps": 3})


def swept(recipe: Path, out: Path, *vary: str, **more: Any) -> dict[str, Any]:
    return sweep(Sweep(recipe, more.pop("overrides", []), axes_of(vary), out, **more), quiet_console())


def assert_as_trained_alone(folder: Path, place: Path) -> None:
    train(load_recipe(folder / "recipe.yaml", [f"output={place}"]), quiet_console())
    assert (folder / ADAPTER).read_bytes() == (place / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("none", "fp32"), *(pytest.param(kind, "bf16", marks=pytest.mark.slow) for kind in ("nf4", "int8", "int4"))],
)
def test_a_point_is_the_run_of_its_recipe_on_the_base_of_the_others(quantization, dtype, recipe, tmp_path, monkeypatch):
    loads, load = [], kept.load_model
    monkeypatch.setattr(kept, "load_model", lambda *given, **how: loads.append(how) or load(*given, **how))
    vary, out = ("adapter.projections=[q,k,v,o],[k]", "train.gradient_checkpointing=full"), tmp_path / "swept"
    set_to = [f"quantization={quantization}", f"dtype={dtype}"]
    found = swept(recipe, out, *vary, overrides=set_to, same_parameters=True)
    assert len(loads) == 1
    assert len(list((out / "prepared").iterdir())) == 1
    first, last = found["points"]
    assert [first["settings"]["adapter.rank"], last["settings"]["adapter.rank"]] == [4, 19]
    # Llama's q, k, v, o: 64 → 64, 32, 32, 64; rank 4 · 448 inputs and outputs = 1,792 = 18.67 · 96
    assert (first["trained_parameters"], last["trained_parameters"]) == (2 * 1792, 2 * 19 * 96)
    assert_as_trained_alone(Path(last["folders"][0]), tmp_path / "alone")


def test_a_base_that_was_changed_in_place_is_loaded_anew(tiny_llama):
    from conftest import with_adapter

    from lora_cli.base.source import find_base

    base, how = kept.KeptBase(), {"quantization": "none", "dtype": torch.float32, "device": torch.device("cpu")}
    source = find_base(str(tiny_llama))
    model = base.load(source, **how)
    names, mode = dict(model.named_modules()).keys(), model.training
    with_adapter(model).train()
    assert base.load(source, **how) is model
    assert dict(model.named_modules()).keys() == names
    assert model.training is mode
    assert not any(each.requires_grad for each in model.parameters())
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    assert base.load(source, **how) is not model
    assert base.load(source, **how | {"dtype": torch.bfloat16}).dtype == torch.bfloat16


def test_a_stopped_sweep_goes_on_where_it_stopped(recipe, tmp_path, monkeypatch):
    hours = iter([None, 1e-9, None, None])
    begun: list[str] = []

    def stopping(recipe: Any, *given: Any, **how: Any) -> Any:
        begun.append(Path(recipe.output).name)
        return train(recipe, *given, max_hours=next(hours), **how)

    monkeypatch.setattr(sweeping, "train", stopping)
    with pytest.raises(Interrupted) as stopped:
        swept(recipe, tmp_path / "swept", "adapter.rank=1,2")
    assert "give the same command again" in (stopped.value.fix or "")
    half = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    assert [each["state"] for each in half["points"]] == ["done", "not finished"]
    found = swept(recipe, tmp_path / "swept", "adapter.rank=1,2")
    assert begun == ["rank-1", "rank-2", "rank-2"]
    assert [each["state"] for each in found["points"]] == ["done", "done"]
    (tmp_path / "swept").rename(tmp_path / "moved")  # a sweep goes on wherever its folder lies
    found = swept(recipe, tmp_path / "moved", "adapter.rank=1,2,3")
    assert begun[3:] == ["rank-3"]
    assert [each["state"] for each in found["points"]] == ["done", "done", "done"]
    (tmp_path / "moved").rename(tmp_path / "swept")
    assert_as_trained_alone(tmp_path / "swept" / "rank-2", tmp_path / "alone")
    changed = refusal(lambda: swept(recipe, tmp_path / "swept", "adapter.rank=1,2", overrides=["train.max_steps=4"]))
    assert "train.max_steps: 3 → 4" in changed.details
    shutil.rmtree(tmp_path / "swept" / "rank-1" / "checkpoints")
    found = swept(recipe, tmp_path / "swept", "adapter.rank=1,2")
    assert [each["state"] for each in found["points"]] == ["failed", "done"], "a run without losses is not compared"
    report = tmp_path / "swept" / "rank-2" / "report.json"
    for damaged in ("[]", "{}", json.dumps({"trained_parameters": 0, "seconds": "long"})):
        report.write_text(damaged)
        assert swept(recipe, tmp_path / "swept", "adapter.rank=1,2")["recommended"] == "rank-2", damaged


def test_a_point_that_fails_ends_neither_the_others_nor_silently(recipe_file, sums, tmp_path, lora):
    held_out = write_rows(tmp_path / "more.jsonl", [{"prompt": f"{at}?", "completion": "y" * at} for at in (3, 5, 9)])
    recipe = recipe_file(data={"validation": str(held_out)}, train={"max_steps": 2})
    vary = ["--vary", "train.learning_rate=1e30,1e-3", "--seeds", "2", "--output", tmp_path / "swept"]
    said = lora("sweep", recipe, *vary)
    assert said.code == 3
    assert "1 of 2 points failed: learning_rate-1e+30" in said.error
    document = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    failed, done = document["points"]
    assert (failed["state"], done["state"]) == ("failed", "done")
    assert "diverged" in failed["why"]
    assert document["recommended"] == document["best"] == done["name"]
    # Both seeds have the same validation rows: an example is their mean, not two examples
    stored = [read_losses(each) for each in sorted((tmp_path / "swept").glob("*-0.001_seed-*/checkpoints/step_000002"))]
    mean = torch.stack([each["validation.best"].double() for each in stored]).mean(0)
    targets = stored[0]["validation.targets"]
    expected = paired_gain(stored[0]["validation.base"].double(), mean, targets)
    assert done["gain"]["examples"] == 3
    assert done["loss"] == pytest.approx(sum(done["seed_losses"]) / 2, abs=1e-6)
    assert (done["gain"]["gain"], done["gain"]["low"]) == pytest.approx((expected.gain, expected.low), abs=1e-9)
    assert "2 seeds" in document["recommendation"]
    page = (tmp_path / "swept" / "sweep.html").read_text()
    assert "learning_rate-1e+30" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("adapter.rnk=1", "did you mean adapter.rank?"),
        ("learning_rat=1e-4", "did you mean train.learning_rate?"),
        ("data.packing=true", "data and base stay the same"),
        ("adapter.rank", "for example --vary adapter.rank=4,16"),
        ("adapter.lora_r=1", "rank"),
        ("adapter.rank=", "for example --vary adapter.rank=1,2,4"),
        ("adapter.rank=]", "for example [q],[v],[q,v]"),
        ("train.seed=1,2", "write --seeds 3 instead"),
    ],
)
def test_what_cannot_be_varied_is_refused_in_words(given, said):
    assert said in (refusal(lambda: axes_of([given])).fix or "")


def test_what_is_asked_for_is_checked_before_anything_is_trained(recipe, recipe_file, lora, tmp_path):
    out = ("--output", tmp_path / "swept")
    hundred = ",".join(map(str, range(1, 101)))
    many = lora("sweep", recipe, "--vary", f"adapter.rank={hundred}", "--vary", f"adapter.alpha={hundred}", *out)
    assert "10,000 trainings" in many.error
    assert "--yes" in many.error
    wrong = lora("sweep", recipe, "--vary", "adapter.rank=4,0", *out)
    assert "--vary adapter.rank: adapter.rank is 0" in wrong.error
    twice = lora("sweep", recipe, "--vary", "train.learning_rate=1e-3,0.001", *out)
    assert "learning_rate-0.001 is named twice" in twice.error
    placed = lora("sweep", recipe, "--vary", "adapter.rank=4,8", "--set", "output=elsewhere", *out)
    assert "name that with --output" in placed.error
    fixed = lora("sweep", recipe, "--vary", "adapter.rank=4,8", "--same-parameters", *out)
    assert "do not vary adapter.rank" in fixed.error
    blind = recipe_file("blind.yaml", data={})
    assert "data.validation: 0.05" in lora("sweep", blind, "--vary", "adapter.rank=4", *out).error
    assert not (tmp_path / "swept").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    taken = lora("sweep", recipe, "--vary", "adapter.rank=4", "--output", tmp_path / "mine")
    assert "already holds other files" in taken.error


def test_how_many_points_go_on():
    four = [100.0] * 4  # seconds of a whole training
    assert how_many(four, (0.25, 0.5), 300) == 4, "all have time to go to the end: 4 · 75"
    assert how_many(four, (0.25, 0.5), 299) == 2
    assert how_many(four, (0.25, 0.5), 100) == 2, "two go on to a half, one of them to the end: 2 · 25 + 50"
    assert how_many(four, (0.25, 0.5), 99) == 1
    assert how_many(four, (0.5,), -5) == 1, "the best is always finished"
    assert how_many([10.0, 500.0, 10.0], (0.5,), 6) == 1, "each takes its own time"


def test_a_budget_stops_the_worse_points_and_they_can_go_on(recipe_file, tmp_path, monkeypatch):
    recipe = recipe_file(data={"validation": 0.25}, adapter={"dropout": 0.1}, train={"max_steps": 8, "eval_every": 4})
    out, vary = tmp_path / "swept", "train.learning_rate=1e-2,1e-3,1e-7"
    monkeypatch.setattr(halving, "how_many", lambda seconds, *_: (len(seconds) + 1) // 2)
    found = swept(recipe, out, vary, hours=99.0)
    states = {each["settings"]["train.learning_rate"]: each["state"] for each in found["points"]}
    assert states == {0.01: "done", 0.001: "stopped", 1e-07: "stopped"}
    assert [(each["part"], each["points"], len(each["kept"])) for each in found["budget"]["rungs"]] == [
        (0.25, 3, 2),
        (0.5, 2, 1),
    ]
    first, *_, last = found["points"]
    assert [each["step"] for each in first["rungs"]] == [2, 4]
    assert [each["step"] for each in last["rungs"]] == [2]
    behind = last["rungs"][0]["behind"]
    assert behind["gain"] == pytest.approx(last["rungs"][0]["loss"] - first["rungs"][0]["loss"], abs=1e-9)
    assert f"stopped at step 2: its loss there is {behind['gain']:.4f}" in last["why"]
    page = (out / "sweep.html").read_text()
    assert last["why"] in page
    assert f"<td class=n>4<td class=n>{first['rungs'][1]['loss']:.4f}<td class=n>" in page
    lines = [json.loads(line) for line in Path(first["folders"][0], "metrics.jsonl").read_text().splitlines()]
    assert first["rungs"][1]["loss"] == pytest.approx(lines[3]["validation_loss"], abs=1e-6)
    found = swept(recipe, out, vary)
    assert {each["state"] for each in found["points"]} == {"done"}
    assert [len(each["rungs"]) for each in found["points"]] == [2, 2, 1]
    assert_as_trained_alone(Path(found["points"][2]["folders"][0]), tmp_path / "alone")


def test_notes_of_other_data_are_not_compared(tmp_path):
    data = SimpleNamespace(data=SimpleNamespace(held_out=True))
    points = [Point(name, {}, [data], [RunFolder(tmp_path / name)]) for name in ("one", "two", "three")]  # type: ignore[list-item]
    targets = {"one": [1, 2], "two": [1, 2, 3], "three": [1, 2]}
    runs = {
        name: {"total": 4, "seconds": 1.0, "targets": own, "losses": {"1": [float(each) for each in own]}}
        for name, own in targets.items()
    }
    compared = halving.rungs_of(points, halving.Notes.model_validate({"runs": runs}))
    assert {name: len(found) for name, found in compared.items()} == {"one": 1, "two": 0, "three": 1}
    for wrong in ({"targets": [0, 0]}, {"targets": [1, 2, 3]}):
        with pytest.raises(ValueError, match="do not fit"):
            halving.Notes.model_validate({"runs": {"one": runs["one"] | wrong}})


def test_a_budget_that_suffices_stops_nothing_and_one_that_does_not_is_refused(recipe, tmp_path, lora):
    given = ("sweep", recipe, "--vary", "adapter.rank=1,2", "--output", tmp_path / "swept", "--budget")
    few = lora(*given, "1e-6")
    assert few.code == 2
    assert "hours are too few: about 0:0" in few.error
    assert "write --budget 0.0" in few.error
    assert not list(tmp_path.glob("swept/*/report.json"))
    assert "hours are too few" in lora(*given, "1e-6").error, "also before anything is trained, once it is known"
    enough = lora(*given, "1", "--json")
    assert enough.code == 0
    document = json.loads(enough.out)
    assert [each["state"] for each in document["points"]] == ["done", "done"]
    assert [each["kept"] for each in document["budget"]["rungs"]][-1] == [
        each["name"] for each in sorted(document["points"], key=lambda each: each["rungs"][-1]["loss"])
    ]
    assert "planned for 1 hours: 2 to step 1, 2 to step 2, 2 to step 3" in enough.text
    assert_as_trained_alone(tmp_path / "swept" / "rank-2", tmp_path / "alone")


KILLED = """
import os, signal, sys
from lora_cli.__main__ import main
from lora_cli.studies import halving
name, at = sys.argv.pop(1), int(sys.argv.pop(1))
real, calls = getattr(halving, name), []
def killing(*given):
    calls.append(given)
    if len(calls) == at:
        if name == "write_json":  # noted, and the run not yet asked to stop
            real(*given)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
setattr(halving, name, killing)
main()
"""


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("SIGINT", 2),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("SIGINT", 3), ("averaged_weights", 2), ("averaged_weights", 3), ("write_json", 1))
        ),
    ],
)
def test_a_sweep_that_is_ended_while_a_point_is_compared_goes_on_the_same(name, at, recipe_file, tmp_path, monkeypatch):
    """At the first rung of the second point, or the second rung of the first, each with a checkpoint of its step."""
    train = {"max_steps": 4, "checkpoint_every": 1, "gradient_accumulation_steps": 1}
    recipe, vary = recipe_file(data={"validation": 0.25}, train=train), "train.learning_rate=1e-2,1e-7"
    monkeypatch.setattr(halving, "how_many", lambda seconds, *_: (len(seconds) + 1) // 2)
    straight, out = swept(recipe, tmp_path / "straight", vary, hours=99.0), tmp_path / "swept"
    if name == "SIGINT":
        compared, own = [], halving.averaged_weights

        def signalled(optimizer: Any) -> Any:
            compared.append(optimizer)
            if len(compared) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return own(optimizer)

        monkeypatch.setattr(halving, "averaged_weights", signalled)
        with pytest.raises(Interrupted) as stopped:
            swept(recipe, out, vary, hours=99.0)
        assert stopped.value.exit_code == 130
    else:
        words = ["sweep", recipe, "--vary", vary, "--budget", 99, "--output", out]
        command = [sys.executable, "-c", KILLED, name, at, *words]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    found = swept(recipe, out, vary, hours=99.0)
    assert found["budget"]["rungs"] == straight["budget"]["rungs"]
    assert [each["state"] for each in found["points"]] == ["done", "stopped"]
    for one, other in zip(found["points"], straight["points"], strict=True):
        assert one["rungs"] == other["rungs"]
    done, alone = (Path(each["points"][0]["folders"][0]) / ADAPTER for each in (found, straight))
    assert done.read_bytes() == alone.read_bytes()


def point(rank: int, loss: float, behind: float | None, half: float) -> dict[str, Any]:
    gain = {"gain": 2 - loss, "low": 2 - loss - 0.1, "high": 2 - loss + 0.1, "examples": 50}
    ends = {"low": None, "high": None} if behind is None else {"low": behind - half, "high": behind + half}
    common = {"settings": {"adapter.rank": rank}, "trained_parameters": 10 * rank, "seed_losses": [loss]}
    return common | {"loss": loss, "gain": gain, "behind": {"gain": behind or 0.0, **ends}}


def test_the_fewest_parameters_that_are_not_certainly_worse_are_recommended():
    from lora_cli.studies.sweep_result import _recommended

    points = [point(1, 1.5, 0.3, 0.1), point(4, 1.25, 0.05, 0.06), point(64, 1.2, 0.0, 0.0)]
    taken = _recommended(points, points[2])
    assert taken is points[1]
    said = recommendation(points, points[2], taken)
    assert said.startswith(
        "Take adapter.rank 4: validation loss 1.2500, 0.7500 ± 0.1000 nats a token below the base's; "
    )
    assert "adapter.rank 64 has the lowest, 0.0500 ± 0.0600 lower, which is not certain, with 16 times" in said
    points[1]["behind"]["low"] = 0.01
    assert _recommended(points, points[2]) is points[2]
    assert "the next, adapter.rank 4, is" in recommendation(points, points[2], points[2])
    points[0]["trained_parameters"] = None  # of a damaged report
    points[0]["behind"]["low"] = -0.01
    assert _recommended(points, points[2]) is points[2]
    recommendation(points, points[2], points[0])
    points[1]["seed_losses"], points[2]["seed_losses"] = [1.2, 1.3], [1.25, 1.15]  # the first seed says otherwise
    assert _recommended(points, points[2]) is points[1]
    assert "lower, which is not certain" in recommendation(points, points[2], points[1])
    worse = [point(1, 1.95, 0.0, 0.0)]
    assert recommendation(worse, worse[0], worse[0]).startswith("No point is certainly better than the base")
