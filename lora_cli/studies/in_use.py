"""Adapters in use, computed both ways: E13 and E14 of docs/design.md, as `equalities.py` has the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.adapters.file import attach_adapter, read_adapter
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.several import Several
from lora_cli.base.trials import ordinary_tokens
from lora_cli.exporting.export import export
from lora_cli.merging.merge import merge
from lora_cli.studies.equalities import Bench, adapted, apart
from lora_cli.studies.tiny import TEXTS

# llama.cpp's log probabilities of the likeliest tokens after each of some rows of tokens. They are those before the
# bias, which has it say a token that is text: of others, such as a byte, it tells nothing.
_LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp as llama
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
server, told = llama.Server(params), []
for tokens in json.loads(sys.argv[2]):
    body = {"prompt": tokens, "n_predict": 1, "n_probs": 10, "temperature": 0, "cache_prompt": False}
    body["logit_bias"] = [[300, 100.0]]
    to, head = server.listening_address + "/completion", {"Content-Type": "application/json"}
    request = urllib.request.Request(to, json.dumps(body).encode(), head)
    likely = json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]
    told.append({each["id"]: each["logprob"] for each in likely})
print(json.dumps(told))
"""


@torch.no_grad()
def mixed(bench: Bench, adapters: Sequence[Path], quantization: str = "none") -> float:
    """E13: a batch whose rows use different adapters, or none = each row on a model with its adapter alone."""
    model = bench.open(quantization)
    rows = ordinary_tokens(model, 8 * (len(adapters) + 1), 0).view(-1, 8).to(bench.device)

    def logits(of: slice) -> Tensor:
        return model(input_ids=rows[of], use_cache=False).logits

    several = Several(model, bench.source)
    several.add({str(each): read_adapter(each) for each in adapters})
    several.use([*({str(each): 1.0} for each in adapters), {}])
    together, alone = logits(slice(None)), []
    for at, each in enumerate([*adapters, None]):
        model = bench.open(quantization)
        if each is not None:
            attach_adapter(model, read_adapter(each), bench.source)
        alone.append(logits(slice(at, at + 1)))
    return apart([together], [torch.cat(alone)])


def different(bench: Bench, quantization: str = "none") -> list[Path]:
    """Three random adapters that differ in rank, alpha and layers."""
    kinds = [("attention", 4, 8.0), ("all-linear", 2, 3.0), ("attention", 1, 4.0)]
    models = [adapted(bench.open(quantization), kind, rank=rank, alpha=alpha) for kind, rank, alpha in kinds]
    return [bench.adapter(each, quantization) for each in models]


@torch.no_grad()
def in_llama_cpp(bench: Bench, adapter: Path) -> float:
    """E14: base + adapter, exported, in llama.cpp = here: log probabilities of the ten likeliest tokens, in nats.

    The base is the tiny model. Needs what the extra `gguf` installs, and xllamacpp.
    """
    from sentencepiece import SentencePieceTrainer  # pyright: ignore[reportMissingImports]

    merge(adapter, folder := bench.place / "for-llama-cpp", dtype="fp32", proof="none")
    settings = {"vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    prefix = str(folder / "tokenizer")  # llama.cpp knows the model's own by no name
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_prefix=prefix, **settings)
    export(str(folder), file := bench.place / "exported.gguf", "gguf", kind="f32")
    model = open_model(None, adapter, dtype="fp32").model
    rows = ordinary_tokens(model, 32, 0).view(2, 16)
    words = [sys.executable, "-c", _LLAMA_CPP, str(file), json.dumps(rows.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    here = model(input_ids=rows.to(model.device), use_cache=False).logits[:, -1].float().log_softmax(-1).cpu()
    told = json.loads(done.stdout.splitlines()[-1])
    return max(
        abs(own[int(at)].item() - value) for own, likely in zip(here, told, strict=True) for at, value in likely.items()
    )
