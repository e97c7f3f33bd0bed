"""Rebuilds tests/golden/smoke.json, the loss curve of the smoke recipe, after a change that means to change it.

python scripts/golden.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recipe = ROOT / "configs" / "smoke-tiny-gpt2.yaml"
        command = [sys.executable, "-m", "lora_cli", "train", str(recipe), "--set", f"output={folder}/run"]
        subprocess.run(command, check=True)
        run = Path(folder) / "run"
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        dtype = json.loads((run / "environment.json").read_text())["dtype"]
    golden = {"recipe": recipe.name, "dtype": dtype, "losses": losses}
    (ROOT / "tests" / "golden" / "smoke.json").write_text(json.dumps(golden, indent=1) + "\n")
