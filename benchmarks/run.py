"""Runs every benchmark, the short ones first: `make bench`. A few hours on two cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("startup.py", "load_memory.py", "data.py", "processes.py", "resume.py", "limit.py", "train.py"):
        print(f"\n── {name}", flush=True)
        subprocess.run([sys.executable, Path(__file__).parent / name], check=True)
