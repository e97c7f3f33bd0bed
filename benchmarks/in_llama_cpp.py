"""A GGUF file in llama.cpp itself (xllamacpp), in a process of its own: `ask` for benchmarks and tests.

Asked, as JSON on stdin, any of: adapter (a file); texts, of which it tells `tokens` and the log probabilities of the
ten tokens that are `likely` next; chat, of which it tells the rendered `prompt`; sequences of token ids, of which it
tells `losses`, in nats, of all tokens but the first; prompts of token ids, of which it tells greedy `completions`.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

AT_ONCE = 8  # sequences that are computed together


def ask(python: Path | str, model: Path, **asked: Any) -> dict[str, Any]:
    """python: an interpreter that has xllamacpp."""
    words = [python, __file__, model]
    done = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


class _Server:
    def __init__(self, model: str, adapter: str):
        llama: Any = import_module("xllamacpp")
        params = llama.CommonParams()
        params.model.path, params.n_parallel, params.n_ctx, params.warmup = model, AT_ONCE, 512 * AT_ONCE, False
        params.cpuparams.n_threads = 1
        if adapter:
            info = llama.CommonAdapterLoraInfo()
            info.path, info.scale = adapter, 1.0
            params.lora_adapters = [info]
        self.server = llama.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        address, kind = self.server.listening_address + path, {"Content-Type": "application/json"}
        return json.load(urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), kind)))

    def complete(self, ids: list[int], new: int, **more: Any) -> Any:
        return self.post("/completion", prompt=ids, n_predict=new, temperature=0, **more)

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def likely(self, ids: list[int]) -> dict[int, float]:
        told = self.complete(ids, 1, n_probs=10, cache_prompt=False)["completion_probabilities"][0]
        return {each["id"]: each["logprob"] for each in told["top_logprobs"]}


class _Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("others", ctypes.c_void_p * 4),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Settings(ctypes.Structure):
    """Of a model or a context, by value: as long as either, and passed on as the defaults that they are."""

    _fields_ = (("bytes", ctypes.c_char * 512),)


def losses(model: str, sequences: list[list[int]]) -> list[list[float]]:
    """Nats of all tokens but the first, by the C functions of llama.h: the server tells no losses of a prompt."""
    import numpy as np

    xllamacpp: Any = import_module("xllamacpp")
    llama: Any = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointers = {"llama_model_load_from_file": [ctypes.c_char_p, Settings]}
    pointers |= {"llama_init_from_model": [ctypes.c_void_p, Settings]}
    pointers |= {"llama_get_memory": [ctypes.c_void_p], "llama_model_get_vocab": [ctypes.c_void_p]}
    for name, arguments in pointers.items():
        getattr(llama, name).restype, getattr(llama, name).argtypes = ctypes.c_void_p, arguments
    for name, made in (("model_default_params", Settings), ("context_default_params", Settings)):
        getattr(llama, f"llama_{name}").restype = made
    llama.llama_batch_get_one.restype, llama.llama_decode.argtypes = _Batch, [ctypes.c_void_p, _Batch]
    llama.llama_get_logits.restype, llama.llama_get_logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
    opened = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(opened, llama.llama_context_default_params())  # 512 tokens
    llama.llama_set_n_threads(ctypes.c_void_p(context), 1, 1)
    words = llama.llama_vocab_n_tokens(ctypes.c_void_p(llama.llama_model_get_vocab(opened)))
    found = []
    for ids in sequences:
        llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(context)), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch points to them
        batch = llama.llama_batch_get_one(tokens, len(ids))
        batch.logits = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), words))[:-1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        likely = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(1))
        found.append((-likely).tolist())
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    server = _Server(sys.argv[1], asked.get("adapter", ""))
    told: dict[str, Any] = {"tokens": [server.tokens(text) for text in asked.get("texts", [])]}
    told["likely"] = [server.likely(ids) for ids in told["tokens"]]
    if "chat" in asked:
        told["prompt"] = server.post("/apply-template", messages=asked["chat"])["prompt"]
    with ThreadPoolExecutor(AT_ONCE) as together:
        made = together.map(lambda ids: server.complete(ids, 48)["content"], asked.get("prompts", []))
        told["completions"] = list(made)
    told["losses"] = losses(sys.argv[1], asked.get("sequences", []))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
