"""The oldest libraries that pyproject.toml allows: models still load, train, evaluate, merge and stream with them."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from conftest import ROOT
from environments import oldest_libraries

FILES = ("test_loop.py", "test_evaluate.py", "test_merge.py", "test_stream.py")


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the first time an environment of 1 GB is made
def test_tiny_models_train_with_the_oldest_libraries_that_are_allowed():
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu and not real_model"]
    words += ["-k", "not tensorboard and not peft"]  # which this environment does not have
    words += ["-o", "filterwarnings="]  # what old libraries warn of among themselves is none of ours
    done = subprocess.run(
        [oldest_libraries(), *words, *(ROOT / "tests" / name for name in FILES)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 50
