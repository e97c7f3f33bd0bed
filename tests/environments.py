"""Other Python environments for the slow tier, made once under build/ and shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock


def environment(name: str, *packages: str) -> Path:
    """The interpreter of an environment with these packages; fails the test, with pip's words, if it cannot be made."""
    folder = ROOT / "build" / "environments" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = folder / "installed.txt"
    with FileLock(folder.with_suffix(".lock")):
        if not made.is_file() or made.read_text(encoding="utf-8").split("\n") != list(packages):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            # PIP_CONSTRAINT: the pins of this program's own environment hold other versions
            install = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *packages],
                env={key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")},
                capture_output=True,
                text=True,
                check=False,
            )
            if install.returncode:
                pytest.fail(f"pip cannot install {' '.join(packages)}: {install.stderr[-2000:]}")
            made.write_text("\n".join(packages), encoding="utf-8")
    return python


def transformers_4() -> Path:
    """What many programs still have: the last transformers before 5."""
    return environment("transformers-4", "transformers==4.57.6", "torch==2.13.0")
