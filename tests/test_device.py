"""What is asked of a device, with a GPU that only says what one would say; and systems that lack what POSIX has."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from lora_cli.base import device as asked
from lora_cli.training.optimizer import paging_note

GPU = torch.device("cuda:0")
GIB = 2**30


@pytest.fixture
def card(monkeypatch) -> list[float]:
    """12 GiB, of which 9 are free beside this program: torch has taken 2 and uses half of them."""
    fractions: list[float] = []
    says: dict[str, Any] = {
        "mem_get_info": lambda _: (9 * GIB, 12 * GIB),
        "memory_reserved": lambda _: 2 * GIB,
        "memory_allocated": lambda _: 1 * GIB,
        "max_memory_reserved": lambda _: 3 * GIB,
        "set_per_process_memory_fraction": lambda fraction, _: fractions.append(fraction),
    }
    for name, answer in says.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return fractions


def test_what_torch_has_taken_and_does_not_use_is_free(card):
    assert asked.free_memory_bytes(GPU) == 10 * GIB


def test_no_more_than_is_there_may_be_taken_or_drivers_lend_host_memory_in_silence(card):
    asked.make_memory_errors_real(GPU)
    assert card == [pytest.approx(11 / 12)]  # what is free, and what torch has already
    asked.make_memory_errors_real(torch.device("cpu"))
    assert len(card) == 1


def test_reserved_memory_is_counted_where_there_is_such_a_thing(card):
    assert asked.reserved_memory_bytes(GPU) == 3 * GIB
    assert asked.reserved_memory_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "sizes", "device", "expected"),
    [
        ("paged_adamw", [65_536, 65_536], "cuda", "none of its states can page"),
        ("paged_adamw_8bit", [300_000, 100_000], "cuda", "100% of its states can page"),
        ("paged_adamw", [300_000, 99_999, 1], "cuda", "75% of its states can page"),
        ("paged_adamw", [65_536], "cpu", None),
        ("adamw_8bit", [65_536], "cuda", None),
    ],
)
def test_a_paged_optimizer_says_how_much_of_it_pages(name, sizes, device, expected):
    note = paging_note(name, sizes, device)
    assert (note is None) if expected is None else expected in (note or "")


POSIX_ONLY = {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog", "posix"}


def test_nothing_that_only_posix_has_is_imported_at_the_start():
    """Windows has none of these modules. Where one is missing, a safer way is taken instead of an error at import."""
    for path in (ROOT / "lora_cli").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what stands in a try or a function may fail
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


def test_memory_is_told_as_far_as_the_system_says(monkeypatch):
    """Without /proc, `resource` and sysconf, as on Windows."""
    monkeypatch.setattr(asked, "resource", None)
    monkeypatch.setattr(asked, "open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()), raising=False)
    monkeypatch.setattr(asked.Path, "exists", lambda _: False)
    monkeypatch.delattr(asked.os, "sysconf")
    assert asked.peak_memory_bytes(torch.device("cpu")) == 0
    assert asked.free_memory_bytes(torch.device("cpu")) == 4 * GIB


def test_pieces_of_gpu_memory_can_grow_unless_the_user_has_settings(monkeypatch):
    """Micro-batches differ in length; must be in the environment before torch is imported."""
    code = "import os, sys\nfrom lora_cli.cli import main\nsys.argv = ['lora', '--version']\n"
    code += "try:\n main()\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'))"
    for given, expected in [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, "None")]:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        if sys.platform == "linux":
            assert done.stdout.splitlines()[-1] == f"False {expected}"
