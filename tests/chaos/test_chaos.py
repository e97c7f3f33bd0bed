"""Twenty kills of a run with everything on, of each kind some, end in the bytes of the run that nobody disturbed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills():
    """A process of its own: every life is forked from it, which this one with its threads could not do."""
    command = [sys.executable, str(ROOT / "tests" / "chaos" / "chaos.py"), "--kills", "20", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills in" in done.stdout
    assert "all ended as the run that nobody disturbed, none in silence" in done.stdout
    landed = [int(count) for count in re.findall(r"^[A-Z/a-z, ]+? +(\d+)$", done.stdout, re.M)]
    assert len(landed) == 10
    assert sum(landed) == 20
