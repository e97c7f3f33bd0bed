"""What torch compiled is code: it is kept where only this user can put it, and never taken from a run."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_console
from transformers import AttentionInterface

from lora_cli.base import compiled
from lora_cli.base.attention import PER_EXAMPLE, per_example_attention
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.training.train import train


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what this machine or an earlier run has set."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(AttentionInterface._global_mapping, PER_EXAMPLE, per_example_attention)


def test_it_is_a_folder_of_the_users_cache_that_nobody_else_can_write(tmp_path):
    before = os.umask(0)
    try:
        place = compiled.cache_folder()
    finally:
        os.umask(before)
    assert place == tmp_path / "cache" / "lora" / "compiled"
    assert [each.stat().st_mode & 0o777 for each in (place, place.parent)] == [0o700, 0o700]
    assert compiled.cache_folder() == place, "and the next run finds it"


def test_what_the_user_named_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert compiled.cache_folder() == tmp_path / "own"


def open_to_others(cache: Path) -> None:
    (cache / "lora" / "compiled").mkdir(parents=True)
    (cache / "lora" / "compiled").chmod(0o777)


def its_parent_open_to_others(cache: Path) -> None:
    (cache / "lora" / "compiled").mkdir(parents=True)
    (cache / "lora").chmod(0o770)


def a_link(cache: Path) -> None:
    (cache / "elsewhere").mkdir(parents=True)
    (cache / "lora").mkdir(mode=0o700)
    (cache / "lora" / "compiled").symlink_to(cache / "elsewhere")


def a_file(cache: Path) -> None:
    cache.write_text("")


@pytest.mark.parametrize("make", [open_to_others, its_parent_open_to_others, a_link, a_file])
def test_a_cache_that_others_may_have_filled_is_not_used(make, tmp_path):
    make(tmp_path / "cache")
    place = compiled.cache_folder()
    assert tmp_path not in place.parents
    assert place.stat().st_mode & 0o777 == 0o700
    assert not list(place.iterdir())
    place.rmdir()


def test_without_a_home_it_is_temporary(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    found = compiled.cache_folder()
    assert found.is_dir()
    assert found.stat().st_mode & 0o077 == 0
    assert found != compiled.cache_folder(), "made anew, so nobody has filled it"


def test_a_new_run_takes_no_folder_that_holds_compiled_code(run_recipe, tmp_path):
    (tmp_path / "run" / "compiled").mkdir(parents=True)
    with pytest.raises(LoraError, match="already holds other files"):
        run_recipe()


def test_a_run_keeps_nothing_executable_and_looks_for_nothing(run_recipe, monkeypatch, tmp_path):
    """Its output holds a stranger's `compiled`; torch is told of another place."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    run, _ = run_recipe(train={"compile": True})
    assert not (run / "compiled").exists()
    assert run not in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert run not in Path(os.environ["TRITON_CACHE_DIR"]).parents


class _Payload:
    def __init__(self, told: Path):
        self.told = told

    def __reduce__(self) -> Any:
        return Path.touch, (self.told,)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch about its own tracing
def test_poisoned_code_in_a_run_is_never_loaded(run_recipe, tmp_path, monkeypatch):
    """Every file that torch would unpickle or load is replaced by one that tells when it is."""
    told = tmp_path / "told"
    run, _ = run_recipe(train={"compile": True, "max_steps": 2})
    torch.compiler.reset()
    cache = tmp_path / "cache" / "lora" / "compiled"
    shutil.copytree(cache, run / "compiled")
    poisoned = [path for path in (run / "compiled").rglob("*") if path.is_file()]
    assert len(poisoned) > 5
    for path in poisoned:
        path.write_bytes(pickle.dumps(_Payload(told)))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    overrides = ["train.max_steps=3"]
    train(load_recipe(run / "recipe.yaml", overrides), quiet_console(), resume=True, allow=["train.max_steps"])
    torch.compiler.reset()
    assert not told.exists()
    pickle.loads(poisoned[0].read_bytes())
    assert told.exists(), "the poison works"
