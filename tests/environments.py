"""Other Python environments for the slow tier, made once under build/ and shared by all tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
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


def oldest_libraries() -> Path:
    """The oldest minor version of each dependency that pyproject.toml allows, and what runs tests.

    torch is the tested one: of the oldest, 2.10, the package index has no build without CUDA.
    """
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    floors = dict(re.fullmatch(r"(\w+)>=([\d.]+)(?:,.*)?", each).groups() for each in declared)  # type: ignore[union-attr]
    oldest = [f"{name}=={floor}.*" for name, floor in floors.items() if name != "torch"]
    return environment("oldest", *oldest, "torch==2.13.0", "pytest", "pytest-timeout", "hypothesis")
