"""Runs the benchmarks of this machine's CPU, the short ones first: `make bench`. A few hours on two cores.

Left out are those that take many hours (small_data, science), an extra (export) or a GPU (gpu). The models of
`make demo` must be there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "build/smollm2-135m-instruct"
FOLDER = "a new folder"
RUNS = (
    *(("startup",), ("host_reads",), ("load_memory",), ("data",), ("adapters",), ("adapters", "--mixed", MODEL)),
    *(("merge", MODEL, FOLDER), ("qa_lora",), ("sweep", FOLDER)),
    *(("processes",), ("resume",), ("blocks",), ("limit",), ("train",)),
)

if __name__ == "__main__":
    for name, *words in RUNS:
        print(f"\n── {' '.join((name, *words))}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            given = [str(Path(place) / "new") if word == FOLDER else word for word in words]
            subprocess.run([sys.executable, Path(__file__).parent / f"{name}.py", *given], check=True)
