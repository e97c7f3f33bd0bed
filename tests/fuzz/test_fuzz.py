"""A few random recipes, damaged and odd files on every run of the tests; `python tests/fuzz/fuzz.py` has thousands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.timeout(900)  # half a minute on a machine that has nothing else to do
@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.isdir("/proc"), reason="needs fork and /proc")
@pytest.mark.parametrize(
    ("sections", "count"),
    [
        (["recipes", "damage", "strangers"], 8),  # in one process, which imports everything and warms up once
        pytest.param(["recipes"], 300, marks=pytest.mark.slow),
        pytest.param(["damage"], 100, marks=pytest.mark.slow),
        pytest.param(["strangers"], 150, marks=pytest.mark.slow),
    ],
)
def test_every_case_ends_in_a_result_or_an_error_that_helps(sections: list[str], count: int):
    one = sections if len(sections) == 1 else []
    command = [sys.executable, ROOT / "tests/fuzz/fuzz.py", *one, "--count", str(count), "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for section in sections:
        assert f"{section}: {count} cases" in ended.stdout
