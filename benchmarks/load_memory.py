"""Peak memory of loading a model in 4-bit: is it the quantized size plus the largest shard?

    python benchmarks/load_memory.py [--layers 24]

Writes a random Llama (2,048 wide, about 50 million weights a layer) in bf16 shards of 200 MB to a temporary folder,
loads it in a process of its own, and compares the growth of that process's memory with what is held afterwards.
Anonymous memory is what counts: pages of the mapped files are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import json, sys, threading, time, torch
from lora_cli.base.load import load_model, quiet_libraries
from lora_cli.base.linear import held_bytes
from lora_cli.base.source import find_base
import bitsandbytes, transformers.models.llama.modeling_llama
quiet_libraries()
def anonymous():
    return sum(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(('RssAnon', 'RssShmem')))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(find_base(sys.argv[1]), quantization='nf4', dtype=torch.bfloat16, device=torch.device('cpu'))
done = True
thread.join()
print(json.dumps({'peak': peak - before, 'after': anonymous() - before, 'held': held_bytes(model)}))
"""


def write_model(folder: Path, layers: int) -> int:
    """A random model in shards; returns the bytes of the largest."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        shard = write_model(Path(name), layers)
        stored = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
        done = subprocess.run([sys.executable, "-c", LOAD, name], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    bound = result["held"] + shard
    mib = 2**20
    print(f"stored {stored / mib:.0f} MiB in shards of at most {shard / mib:.0f} MiB")
    print(f"held in NF4 {result['held'] / mib:.0f} MiB")
    print(
        f"peak while loading {result['peak'] / mib:.0f} MiB, which is {result['peak'] / bound:.2f} of "
        f"quantized size + largest shard ({bound / mib:.0f} MiB)"
    )


if __name__ == "__main__":
    main()
