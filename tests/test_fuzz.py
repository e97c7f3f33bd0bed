"""A few random recipes and damaged files on every run of the tests; benchmarks/fuzz.py has thousands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.timeout(900)  # half a minute on a machine that has nothing else to do
@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.isdir("/proc"), reason="needs fork and /proc")
@pytest.mark.parametrize(("section", "count"), [("recipes", 150), ("damage", 60)])
def test_every_case_ends_in_a_result_or_an_error_that_helps(section: str, count: int):
    command = [sys.executable, ROOT / "benchmarks/fuzz.py", section, "--count", str(count), "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{section}: {count} cases" in ended.stdout
