"""Runs every benchmark, the short ones first: `make bench`. A few hours on two cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("startup", "load_memory", "data", "adapters", "processes", "resume", "blocks", "limit", "train"):
        print(f"\n── {name}", flush=True)
        subprocess.run([sys.executable, Path(__file__).parent / f"{name}.py"], check=True)
