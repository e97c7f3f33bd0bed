"""Fine-tune Hugging Face causal language models with LoRA and QLoRA, from one YAML recipe."""

import os

__version__ = "0.1.0"

# Read by torch at its first allocation: large tensors on a CPU come in huge pages where Linux allows it, so that the
# first step does not spend as long on page faults as on its arithmetic.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
