"""Memory and time of `lora merge` without its proof, over `cp` of the base, and beside PEFT's merge_and_unload.

python benchmarks/merge.py BASE FOLDER. BASE: a model folder, or `synthetic` for a Llama shape of 1.1 billion random
weights in bf16, which is written into FOLDER. The adapter: rank 16 on all linear layers, random, on plain weights.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path


def synthetic(folder: Path, tokenizer: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    settings = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(str(folder))


def peak_kib() -> int:
    """Not ru_maxrss, which a process takes over from the one that started it."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def measured(how: str, base: Path, folder: Path) -> None:
    """Print the seconds, and the MB above the peak that the interpreter with its libraries has."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from lora_cli.merging.merge import merge

    before, start = peak_kib(), time.perf_counter()
    if how == "lora":
        merge(folder / "adapter", folder / how, base=str(base), proof="none")
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / how)
    seconds, peak = time.perf_counter() - start, peak_kib() - before
    print(f"{how}: {seconds:.1f} s, {peak / 1024:.0f} MiB above the libraries")


def main() -> None:
    if len(sys.argv) == 4:
        how, base, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
        adapter(base, folder / "adapter") if how == "adapter" else measured(how, base, folder)
        return
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    small = Path("build/smollm2-135m-instruct")
    base = synthetic(folder / "base", small) if sys.argv[1] == "synthetic" else Path(sys.argv[1])
    for how in ("adapter", "lora", "peft"):
        subprocess.run([sys.executable, __file__, how, str(base), str(folder)], check=True)
    start = time.perf_counter()
    shutil.copytree(base, folder / "copy")
    print(f"cp of the base: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
