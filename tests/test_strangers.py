"""Folders that a stranger or the user has put something into: nothing outside is touched, nothing of theirs is lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_console, write_rows
from safetensors.torch import load_file, save_file

from lora_cli.data import cache
from lora_cli.data.store import checksum, open_prepared
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate import evaluate_run
from lora_cli.foreign import NotOurs
from lora_cli.merging.merge import merge
from lora_cli.planning.check import check
from lora_cli.recipe import load_recipe
from lora_cli.training import checkpoint
from lora_cli.training.run_folder import RunFolder
from lora_cli.training.runs import list_runs
from lora_cli.training.train import train

TREES = int(os.environ.get("LORA_TEST_TREES", "10"))  # of random folders
SMALL = {"max_steps": 4, "checkpoint_every": 2, "eval_every": 2, "keep_checkpoints": 3}


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that stopped after step 4 of 6, with all that a run folder can hold but its report."""
    import yaml

    place = tmp_path_factory.mktemp("begun")
    rows = [{"prompt": f"What is {n} plus 1?\n", "completion": f"It is {n + 1}."} for n in range(16)]
    values = {
        "base_model": str(tiny_llama),
        "quantization": "none",
        "dtype": "fp32",
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_rows(place / "rows.jsonl", rows)), "max_seq_len": 64, "validation": 0.25},
        "train": {"epochs": 9, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.01} | SMALL,
        "output": str(place / "run"),
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    train(load_recipe(place / "recipe.yaml"), quiet_console())
    path = place / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("max_steps: 4", "max_steps: 6"))
    return place / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(begun, tmp_path / "run"))
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(str(begun), str(copy)))
    return copy


def recipe_of(run: Path, *more: str, output: Path | None = None) -> Any:
    return load_recipe(run / "recipe.yaml", [f"output={output or run}", *more])


def resume(run: Path) -> dict[str, Any]:
    return train(recipe_of(run), quiet_console(), resume=True)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What is the user's, elsewhere."""
    folder = tmp_path / "outside"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "precious.txt").write_text("precious")
    (folder / "id_rsa").write_text("a private key")
    (folder / ".cache.tmp-1").mkdir()
    (folder / ".keep.old-9").mkdir()
    (folder / "keep").mkdir()
    return folder


def snapshot(folder: Path) -> dict[str, Any]:
    """Every name below a folder with its kind and contents; no link is followed."""
    found: dict[str, Any] = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = ("link", os.readlink(path))
            elif path.is_dir():
                found[key] = ("folder",)
            elif path.is_file():
                found[key] = ("file", path.read_bytes())
            else:
                found[key] = ("pipe",)
    return found


def newest(run: Path) -> Path:
    return RunFolder(run).list_checkpoints()[-1]


def rehash(folder: Path) -> None:
    """A manifest is no secret: a stranger can write one that fits whatever they put into a checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["files"] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["checksum"] = checkpoint._checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "state.json").read_text())
    edit(values)
    (folder / "state.json").write_text(json.dumps(values))
    rehash(folder)


# ── prepared data ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["train", "check"])
def test_what_the_user_has_in_prepared_stays_there(begun, tmp_path, how):
    output = tmp_path / "new"
    mine = ["corpus/a.txt", f"{'0' * 20}/photo", f"{'1' * 20}/summary.json", "a.txt", ".b.building-4194305/c"]
    for name in mine:
        (output / "prepared" / name).parent.mkdir(parents=True, exist_ok=True)
        (output / "prepared" / name).write_text("precious")
    old = Path(shutil.copytree(next((begun / "prepared").iterdir()), output / "prepared" / ("2" * 20)))
    (old / "notes").write_text("precious")
    recipe = recipe_of(begun, "train.max_steps=1", output=output)
    train(recipe, quiet_console()) if how == "train" else check(recipe, keep=True)
    for name in (*mine, f"{'2' * 20}/notes"):
        assert (output / "prepared" / name).read_text() == "precious", name
    assert [path.name for path in old.iterdir()] == ["notes"], "what lora prepared before goes"


@pytest.mark.parametrize("what", ["prepared", "key"])
@pytest.mark.parametrize("how", ["train", "resume", "check"])
def test_prepared_data_behind_a_link_are_refused_and_left_alone(run, outside, tmp_path, what, how):
    before = snapshot(outside)
    output = run if how == "resume" else tmp_path / "new"
    output.mkdir(exist_ok=True)
    (key,) = [path.name for path in (run / "prepared").iterdir()]
    place = output / "prepared" if what == "prepared" else output / "prepared" / key
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside)
    recipe = recipe_of(run, output=output)
    prepares = {
        "check": lambda: check(recipe, keep=True),
        "train": lambda: train(recipe, quiet_console()),
        "resume": lambda: train(recipe, quiet_console(), resume=True),
    }
    with pytest.raises(NotOurs, match="this is a link"):
        prepares[how]()
    assert snapshot(outside) == before


def test_prepared_data_that_came_from_elsewhere_are_made_anew(begun, run):
    """Their checksums are anybody's to write, so a stranger could have other tokens trained than the data have."""
    (place,) = (run / "prepared").iterdir()
    (original,) = (begun / "prepared").iterdir()
    assert cache.made_here(original)
    shutil.copyfile(place / "validation.arrow", place / "train.arrow")
    stored = json.loads((place / "summary.json").read_text())
    stored["checksums"]["train.arrow"] = checksum(place / "train.arrow")
    (place / "summary.json").write_text(json.dumps(stored))
    poisoned = open_prepared(place)
    assert poisoned is not None
    assert not cache.made_here(place)
    resume(run)
    assert (place / "train.arrow").read_bytes() == (original / "train.arrow").read_bytes()
    assert cache.made_here(place)


@pytest.mark.parametrize("data", ["{}", "{}/*", "{}/**/*.jsonl"])
def test_an_output_among_the_data_is_not_data(begun, tmp_path, data):
    mix = tmp_path / "mix"
    mix.mkdir()
    shutil.copy(begun.parent / "rows.jsonl", mix)
    more = [f"data.train={data.format(mix)}", "data.validation=null", "train.eval_every=null"]
    for name in ("one", "two"):
        train(recipe_of(begun, "train.max_steps=2", *more, output=mix / name), quiet_console())
        train(
            recipe_of(begun, "train.max_steps=3", *more, output=mix / name),
            quiet_console(),
            resume=True,
            allow=["train.max_steps"],
        )
        files = json.loads((mix / name / "environment.json").read_text())["data_files"]
        assert list(files) == [str(mix / "rows.jsonl")]


def test_a_data_file_whose_name_is_not_text_is_refused(begun, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(begun.parent / "rows.jsonl", tmp_path / "data" / "\udcff.jsonl")
    with pytest.raises(LoraError, match="not text in UTF-8") as raised:
        train(recipe_of(begun, f"data.train={tmp_path / 'data'}", output=tmp_path / "new"), quiet_console())
    assert "rename it" in raised.value.render()
    assert raised.value.render().encode()


# ── the lock ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["link", "dangling link", "hard link", "own file"])
@pytest.mark.parametrize("how", ["train", "resume"])
def test_a_lock_that_is_not_ours_is_refused_and_nothing_is_overwritten(run, outside, tmp_path, what, how):
    output = run if how == "resume" else tmp_path / "new"
    output.mkdir(exist_ok=True)
    lock = output / ".lock"
    if what == "hard link":
        os.link(outside / "id_rsa", lock)
    elif what == "own file":
        lock.write_text("mine")
    else:
        lock.symlink_to(outside / ("id_rsa" if what == "link" else "missing"))
    before = snapshot(outside), snapshot(output)
    with pytest.raises(LoraError, match=r"\.lock: this"):
        train(recipe_of(run, output=output), quiet_console(), resume=how == "resume")
    assert (snapshot(outside), snapshot(output)) == before
    lock.unlink()
    if how == "train":
        train(recipe_of(run, "train.max_steps=1", output=output), quiet_console())


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["link", "listed file", "listed link"])
def test_nothing_but_an_adapter_is_copied_from_a_checkpoint_into_the_adapter(run, outside, what):
    best = newest(run) / "best"
    edit_state(newest(run), lambda values: values.update(best_validation_loss=-1.0))
    if what == "link":
        (best / ".cache").symlink_to(outside)
    elif what == "listed file":
        (best / "id_rsa").write_text("a private key")
        rehash(newest(run))
    else:
        (best / "chat_template.jinja").symlink_to(outside / "id_rsa")
        rehash(newest(run))
    before = snapshot(outside)
    resume(run)
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (run / "adapter").iterdir()} == expected
    assert snapshot(outside) == before
    assert list((run / "checkpoints").glob("damaged_*")), "it is set aside, with the reason"


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_000004", "checkpoints/step_000006"])
def test_a_checkpoint_behind_a_link_is_refused_and_what_it_points_to_is_left_alone(run, outside, name, begun):
    other = Path(shutil.copytree(begun / "checkpoints", outside / "checkpoints"))
    target = other if name == "checkpoints" else other / "step_000002"
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(target)
    before = snapshot(outside)
    with pytest.raises(NotOurs, match="this is a link"):
        resume(run)
    assert snapshot(outside) == before


MOMENTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "of one number": lambda t: t.update({k: torch.zeros(1, 1) for k in t if "exp_avg" in k}),
    "longer": lambda t: t.update({k: torch.cat([v, v]) for k, v in t.items() if "exp_avg" in k}),
    "transposed": lambda t: t.update({k: v.T.contiguous() for k, v in t.items() if k.endswith("exp_avg")}),
    "in bf16": lambda t: t.update({k: v.bfloat16() for k, v in t.items() if "exp_avg" in k}),
    "of doubles": lambda t: t.update({k: v.double() for k, v in t.items() if k.endswith("exp_avg_sq")}),
    "with a step of many": lambda t: t.update({k: torch.zeros(9) for k in t if k.endswith("step")}),
    "missing": lambda t: t.clear(),
}


@pytest.mark.parametrize("how", MOMENTS)
def test_moments_that_do_not_fit_the_parameters_are_refused_before_any_kernel_sees_them(run, how):
    path = newest(run) / "optimizer.safetensors"
    tensors = load_file(path)
    MOMENTS[how](tensors)
    path.unlink()
    save_file(tensors, path)
    rehash(newest(run))
    with pytest.raises(LoraError, match="state of another optimizer") as raised:
        resume(run)
    assert "remove this checkpoint" in str(raised.value.fix)
    shutil.rmtree(newest(run))
    assert resume(run)["steps"] == 6


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "schedule_free_adamw"])
def test_a_step_over_zeros_shows_what_an_optimizer_keeps_and_changes_nothing(tiny_llama, begun, kind):
    from lora_cli.training.optimizer import make_optimizer, state_after_a_step

    recipe = recipe_of(begun, f"train.optimizer={kind}", "train.schedule=constant", "train.warmup_ratio=0")
    from transformers import AutoModelForCausalLM

    from lora_cli.training.passes import attach_from_recipe

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach_from_recipe(model, recipe)
    optimizer = make_optimizer(recipe.train, model)
    before = [each.detach().clone() for group in optimizer.param_groups for each in group["params"]]
    shown = state_after_a_step(optimizer)
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    assert not any(optimizer.state.values())
    for each in parameters:
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert checkpoint._unlike(optimizer.state_dict(), shown, "") is None


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "step is text": lambda v: v.update(step="x"),
    "step is a fraction": lambda v: v.update(step=4.5),
    "step is another": lambda v: v.update(step=10**9),
    "no tokens": lambda v: v.pop("tokens") and v.update(tokens="x"),
    "no random": lambda v: v.pop("random"),
    "random is null": lambda v: v.update(random=None),
    "random is junk": lambda v: v["random"].update(python=[3, "x"]),
    "an unknown generator": lambda v: v["random"]["numpy"].update(bit_generator="X"),
    "a position behind the end": lambda v: v["random"]["numpy"].update(pos=10**6),
    "no optimizer": lambda v: v.pop("optimizer"),
    "optimizer is junk": lambda v: v.update(optimizer="x"),
    "optimizer is a list": lambda v: v.update(optimizer=[[1]]),
    "optimizer without groups": lambda v: v.update(optimizer={"items": []}),
    "a rate of text": lambda v: v["optimizer"]["items"][1][1][0]["items"].__setitem__(0, ["lr", "x"]),
    "no parts": lambda v: v.update(parts=0),
    "parts are text": lambda v: v.update(parts="x"),
    "first_loss is text": lambda v: v.update(first_loss="x"),
    "pending is empty": lambda v: v.update(pending={}),
    "pending is a list": lambda v: v.update(pending=[]),
    "rewound is short": lambda v: v.update(rewound=[["a"]]),
    "position is half": lambda v: v.update(position={"pass": 1}),
    "loss_scale is half": lambda v: v.update(loss_scale={"scale": 1.0}),
    "NaN": lambda v: v.update(seconds=float("nan")),
    "huge": lambda v: v.update(tokens=10**400),
}


@pytest.mark.parametrize("how", STATES)
def test_a_state_that_no_run_wrote_is_set_aside_or_refused_in_words(run, how):
    edit_state(newest(run), STATES[how])
    problem = None
    try:
        resume(run)
    except LoraError as error:
        problem = error
    if problem is None:
        assert list((run / "checkpoints").glob("damaged_step_000004"))
    else:
        assert "step_000004" in problem.render()
        assert problem.fix


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"", b"\xff"])
def test_a_state_that_is_something_else_is_set_aside(run, content):
    (newest(run) / "state.json").write_bytes(content)
    rehash(newest(run))
    assert resume(run)["steps"] == 6


def test_any_number_of_parts_costs_no_memory(run):
    """Each micro-batch can be cut no finer than into its examples."""
    edit_state(newest(run), lambda values: values.update(parts=10**12))
    assert resume(run)["steps"] == 6


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "python cut": lambda t: t.update({"random.python": t["random.python"][:9]}),
    "python negative": lambda t: t.update({"random.python": -t["random.python"] - 1}),
    "python missing": lambda t: t.pop("random.python"),
    "numpy cut": lambda t: t.update({"random.numpy": t["random.numpy"][:9]}),
    "torch cut": lambda t: t.update({"random.torch": t["random.torch"][:9]}),
    "torch zero": lambda t: t.update({"random.torch": torch.zeros_like(t["random.torch"])}),
    "torch missing": lambda t: t.pop("random.torch"),
    "no targets": lambda t: t.update({"validation.targets": torch.zeros_like(t["validation.targets"])}),
    "targets missing": lambda t: t.pop("validation.targets"),
    "base missing": lambda t: t.pop("validation.base"),
    "losses cut": lambda t: t.update({"validation.best": t["validation.best"][:1]}),
    "losses NaN": lambda t: t.update({"validation.base": t["validation.base"] * float("nan")}),
    "a tensor more": lambda t: t.update({"x": torch.zeros(1)}),
}


@pytest.mark.parametrize("how", TENSORS)
def test_tensors_that_no_run_wrote_are_set_aside(run, how):
    path = newest(run) / "state.safetensors"
    tensors = load_file(path)
    TENSORS[how](tensors)
    path.unlink()
    save_file(tensors, path)
    rehash(newest(run))
    with pytest.raises(checkpoint.Damaged, match=r"state\.safetensors"):
        checkpoint.verify(newest(run))
    if how in ("python cut", "losses NaN"):  # the others go the same way
        assert resume(run)["steps"] == 6


def test_losses_of_other_examples_than_the_data_have_are_refused(run):
    path = newest(run) / "state.safetensors"
    tensors = load_file(path)
    for name in ("base", "best", "targets"):
        tensors[f"validation.{name}"] = tensors[f"validation.{name}"].repeat(2)
    path.unlink()
    save_file(tensors, path)
    rehash(newest(run))
    with pytest.raises(LoraError, match="validation examples"):
        resume(run)
    shutil.rmtree(newest(run))
    assert resume(run)["steps"] == 6


# ── the rest of a run folder ────────────────────────────────────────────────────────────────────────────────────


def test_a_status_of_a_stranger_is_not_handed_on(run):
    (run / "status.json").write_text('{"wall_seconds": 1' + "0" * 400 + ', "evil": NaN}')
    resume(run)
    said = json.loads((run / "status.json").read_text(), parse_constant=pytest.fail)
    assert "evil" not in said
    (run / "status.json").write_text(json.dumps(said | {"evil": 1, "wall_seconds": 9000.0}))
    RunFolder(run).say_state("done")
    assert "evil" not in (run / "status.json").read_text()
    assert RunFolder(run).wall_seconds() == 9000.0


LINKS = ["adapter", "adapter_last", "status.json", "metrics.jsonl", "environment.json", "report.json", "loss.png"]
LINKS += ["samples.jsonl"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_under_a_name_of_a_run_is_refused(run, outside, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside / ("letters" if "." not in name else "id_rsa"))
    before = snapshot(outside), snapshot(run)
    with pytest.raises(NotOurs, match=f"{name}: this is a link"):
        resume(run)
    assert (snapshot(outside), snapshot(run)) == before
    path.unlink()
    if name != "environment.json":
        assert resume(run)["steps"] == 6


@pytest.mark.parametrize("name", [".adapter.tmp-1", ".adapter.old-1", "checkpoints/.step_000004.tmp-1", ".x.tmp-1"])
@pytest.mark.parametrize("what", ["link", "file", "folder"])
def test_names_of_what_a_kill_leaves_are_cleared_only_where_it_left_them(run, outside, name, what):
    path = run / name
    if what == "link":
        path.symlink_to(outside)
    elif what == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = snapshot(outside)
    RunFolder(run).clear_after_a_kill()
    assert snapshot(outside) == before
    if what == "folder":  # what it holds beside ours goes where its successor is
        assert [each.read_text() for each in run.rglob("notes.txt")] == ["mine"]
    else:
        assert path.is_symlink() if what == "link" else path.read_text() == "mine"


def test_what_the_user_has_beside_the_adapter_stays_when_a_better_one_comes(run):
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "adapter_last" / "eval").mkdir()
    (run / "adapter_last" / "eval" / "scores.json").write_text("mine")
    (run / "checkpoints" / "step_000002" / "notes.txt").write_text("mine")
    resume(run)
    left = [path for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert sorted(path.relative_to(run).as_posix() for path in left) == [
        "adapter/notes.txt",
        "adapter_last/eval/scores.json",
        "checkpoints/step_000002/notes.txt",
    ]


# ── any folder ──────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [  # that a run, or what was killed in it, may give to a file or a folder
    ".lock",
    "prepared",
    "checkpoints",
    "adapter",
    "adapter_last",
    "compiled",
    "status.json",
    "metrics.jsonl",
    "samples.jsonl",
    "report.json",
    "report.html",
    "loss.png",
    "environment.json",
    "recipe.yaml",
    "logs",
    "lora",
    "prepared/KEY",
    "prepared/KEY/summary.json",
    "prepared/KEY/train.arrow",
    "prepared/corpus",
    "checkpoints/step_000002",
    "checkpoints/step_000004",
    "checkpoints/step_000006",
    "checkpoints/step_000004/best",
    "checkpoints/step_000004/state.json",
    "checkpoints/step_000004/metrics.jsonl",
    "checkpoints/step_000004/best/.cache",
    "checkpoints/step_000004/best/adapter_config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/README.md",
    ".adapter.tmp-1",
    ".adapter.old-1",
    ".status.json.tmp-1",
    "checkpoints/.step_000002.old-3",
    "checkpoints/damaged_step_000004",
]
KINDS = ["link", "link", "folder link", "dangling", "hard link", "pipe", "file", "folder", "notes"]


def plant(path: Path, kind: str, outside: Path, number: int) -> None:
    """Put something at `path`. What is the user's own holds the words `mine`, and its name is not ours."""
    if not path.parent.is_dir() or path.parent.is_symlink():
        return
    if kind == "notes":
        if path.is_dir() and not path.is_symlink():
            (path / f"mine-{number}.txt").write_text(f"mine {number}")
        return
    if path.is_symlink() or path.exists():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "hard link":
        os.link(outside / "id_rsa", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("{}")
    elif kind == "folder":
        path.mkdir()
        (path / f"mine-{number}.txt").write_text(f"mine {number}")
    else:
        target = {"link": "id_rsa", "folder link": "letters", "dangling": "missing"}[kind]
        path.symlink_to(outside / target)


def own(folder: Path) -> list[bytes]:
    found = [path.read_bytes() for path in folder.rglob("mine-*.txt") if path.is_file() and not path.is_symlink()]
    return sorted(found)


@pytest.mark.parametrize("seed", range(TREES))
def test_whatever_a_folder_holds_nothing_outside_changes_and_nothing_of_the_users_is_lost(
    begun, run, outside, tmp_path, seed
):
    rng = random.Random(seed)
    (key,) = [path.name for path in (run / "prepared").iterdir()]
    fresh = rng.random() < 0.4
    folder = tmp_path / "new" if fresh else run
    folder.mkdir(exist_ok=True)
    planted = []
    for number in range(rng.randint(1, 3)):
        name = rng.choice(NAMES[: 5 if fresh and rng.random() < 0.7 else None]).replace("KEY", key)
        kind = rng.choice(KINDS)
        planted.append((kind, name))
        plant(folder / name, kind, outside, number)
    before, mine = snapshot(outside), own(folder)

    def recipe(*more: str) -> Any:
        return recipe_of(begun, "train.max_steps=1", "train.eval_every=1", *more, output=folder)

    commands: dict[str, Callable[[], Any]] = {
        "check": lambda: check(recipe(), keep=True),
        "train": lambda: train(recipe(), quiet_console()),
        "resume": lambda: train(recipe_of(folder), quiet_console(), resume=True),
        "runs": lambda: list_runs(tmp_path),
        "eval": lambda: evaluate_run(folder, None),
        "merge": lambda: merge(folder, tmp_path / "merged"),
    }
    chosen = ["check", "train"] if fresh else ["resume", rng.choice(["check", "eval", "merge"])]
    for command in [*chosen, "runs"]:
        with suppress(LoraError):  # and no other
            commands[command]()
        assert snapshot(outside) == before, (seed, planted, command)
        assert own(folder) == mine, (seed, planted, command)
    private = b"a private key"
    shipped = [path for path in (folder / "adapter").glob("*") if path.is_file()]
    for path in shipped if not (folder / "adapter").is_symlink() else ():
        assert path.is_symlink() or os.stat(path).st_nlink > 1 or path.read_bytes() != private, (seed, planted)
