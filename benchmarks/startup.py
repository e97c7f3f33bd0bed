"""Time of `lora --help` over the time of importing the libraries that any such program imports.

    python benchmarks/startup.py [--runs 20]

Runs alternate, so that a machine that gets slower slows both; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

LORA = str(Path(sys.executable).parent / "lora")
BASELINE = [sys.executable, "-c", "import typer, rich"]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    pairs = [(seconds([LORA, "--help"]), seconds(BASELINE)) for _ in range(runs + 1)][1:]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"lora --help {ours:.3f} s, import typer, rich {theirs:.3f} s, ratio {ratio:.2f} (median of {runs})")


if __name__ == "__main__":
    main()
