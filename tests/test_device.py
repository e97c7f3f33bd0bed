"""What is asked of a device, with a GPU that only says what one would say; and systems that lack what POSIX has."""

from __future__ import annotations

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


POSIX_ONLY = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ours = set(sys.modules)
for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
import lora_cli
for found in pkgutil.walk_packages(lora_cli.__path__, "lora_cli."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from lora_cli.base.device import free_memory_bytes, peak_memory_bytes
import torch
print(free_memory_bytes(torch.device("cpu")) > 0, peak_memory_bytes(torch.device("cpu")) >= 0)
"""


def test_nothing_that_only_posix_has_is_imported_at_the_start():
    """On Windows there is no fcntl and no resource; the libraries below import theirs behind a test of the system."""
    done = subprocess.run([sys.executable, "-c", POSIX_ONLY], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True True", done.stderr[-2000:]
