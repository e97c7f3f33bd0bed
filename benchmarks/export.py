"""What the block types of GGUF cost: loss of exported files, read back by transformers' own GGUF reader.

    pip install -c constraints.txt '.[gguf]'
    python benchmarks/export.py [--base build/smollm2-135m-instruct] [--spread 0.1] [--rows 40]

On a model off its grid (`off_grid.py`); losses as in `qa_lora.py`: nats a token of SQL answers, in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from off_grid import move_off_grid
from qa_lora import loss_of
from transformers import AutoModelForCausalLM

from lora_cli.base.load import load_tokenizer, quiet_libraries
from lora_cli.base.source import find_base
from lora_cli.exporting.export import BY_BLOCKS, export

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))


def main() -> None:
    from text_to_sql import make_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/smollm2-135m-instruct"))
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=40)
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "off"
        move_off_grid(given.base, base, spread=given.spread)
        tokenizer, rows = load_tokenizer(find_base(str(base))), make_rows(given.rows, 0, held_out=True)
        first = None
        for kind in ("none", "f16", "q8_0", *reversed(BY_BLOCKS)):
            if kind == "none":
                model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            else:
                made = export(str(base), Path(folder) / f"{kind}.gguf", "gguf", kind=kind)
                model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf", dtype=torch.float32)
            losses, tokens = loss_of(model, tokenizer, rows).unbind(1)
            first = losses if first is None else first
            cost = (losses - first) / tokens.sum()
            half = 1.96 * (cost - cost.mean()).square().sum().sqrt().item()
            size = f", {made.bytes / 2**20:.0f} MiB" if kind != "none" else ""
            print(f"{kind:5} {losses.sum() / tokens.sum():.4f} ({cost.sum():+.4f} ± {half:.4f}){size}", flush=True)


if __name__ == "__main__":
    main()
