"""How fast and how lean training is on the GPU of this machine: `make gpu`, or one section at a time. Offline.

    python benchmarks/gpu.py [SECTION ...] [--tiny] [--out benchmarks/results]      all sections without a name

card       the card's own limits: matrix products, copies, dequantizing NF4
tests      the tests marked gpu
llama-8b, qwen-4b, llama-3b     steps of Llama-3.1-8B's, Qwen3-4B's and Llama-3.2-3B's shape: tokens a second, peak
           memory beside the estimate of `lora init`, the time by part, the distance to the card's limits
peers      the same rows and initial A in TRL + PEFT and in unsloth, where they are installed
modes      Llama-3B's shape with each way to keep less, compiled, with Liger's kernels where they are installed, in
           fp16 with loss scaling, with paged optimizers
longest, longest-offload     the longest row that trains in 8, 12, 16 and 24 GB with gradient_checkpointing: full, or
           with the blocks' inputs in host memory
auto       micro_batch_size: auto where memory runs out for real

A section takes at most 8 minutes: what has not begun by then is left out, aloud. Each writes <card>-<section>.json and
a page of it, .md. Models have random NF4 weights, made here from their configs; rank 16 on all linear layers. Rows are
random words: two of 2,048 tokens a step, one of 4,096, or 16 of mixed lengths. --tiny: the same with tiny models.
A figure is only worth something beside others of the same card and driver. Peak memory is what torch took of the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from train import cap_memory, measure, ours, peak_memory_bytes
from train_rows import ROOT, ROWS, Work, prepare_work, recipe_of

SECONDS, LEAST = 480, 20  # of a section; of a case that is begun
LEFT_OUT = {"failed": "left out: the section's time is over"}
STEPS = 8
GB = 0.93  # GiB of a card that is sold as one of 1 GB, which a process can take beside the driver
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "head_dim": 128}
QWEN = {"model_type": "qwen3", "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6, "head_dim": 128}
NAMES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"]
SHAPES = {  # as in their published config.json
    "llama-8b": LLAMA | dict(zip(NAMES, (4096, 14336, 32, 32, False), strict=True)),
    "qwen-4b": QWEN | dict(zip(NAMES, (2560, 9728, 36, 32, True), strict=True)),
    "llama-3b": LLAMA | dict(zip(NAMES, (3072, 8192, 28, 24, True), strict=True)),
}
TINY = dict(zip(NAMES, (64, 128, 2, 4, True), strict=True), vocab_size=512, num_key_value_heads=2, head_dim=16)
PARTS = {  # by the names of kernels, or on a CPU of operations; the first that fits
    "matrix products": "gemm|cutlass|nvjet|xmma|::mm$|::addmm$|::bmm$",
    "attention": "flash|fmha|attention",
    "dequantizing": "dequant",
    "optimizer": "adam|multi_tensor|foreach",
    "copies": "memcpy|memset|copy_$",
    "elementwise work, reductions and the rest": "",
}


# ── models and rows ─────────────────────────────────────────────────────────────────────────────────────────────


def make_model(shape: str, place: Path, tiny: bool) -> Path:
    """A model folder as from a hub, with random weights that are stored in NF4, and a tokenizer of a token a word."""
    folder = place / shape
    if folder.exists():
        return folder
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

    settings = SHAPES[shape] | (TINY if tiny else {})
    config = AutoConfig.for_model(**settings, max_position_embeddings=131072, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(empty).__name__], torch.bfloat16
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config.quantization_config = BitsAndBytesConfig(**stored, bnb_4bit_compute_dtype=torch.bfloat16).to_dict()
    device, making = device_name(), place / f"{shape}.part"
    config.save_pretrained(making)
    torch.manual_seed(0)
    linear = {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    linear.discard("lm_head.weight")
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in empty.named_parameters():
        value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16).mul_(0.02)
        if parameter.dim() == 1:
            value.fill_(1)
        tensors = {name: value}
        if name in linear:
            packed, state = quantize_4bit(value, compress_statistics=True, quant_type="nf4")
            tensors = {name: packed} | {f"{name}.{key}": each for key, each in state.as_dict(packed=True).items()}
        shards[-1] |= {key: each.cpu().contiguous() for key, each in tensors.items()}
        if sum(each.nbytes for each in shards[-1].values()) > 2**31:
            shards.append({})
    index = {}
    for number, tensors in enumerate(filter(None, shards)):
        save_file(tensors, making / f"model-{number}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (making / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, settings["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(making)
    return making.rename(folder)


def words(lengths: Callable[[random.Random], int], count: int, _tokenizer: Any) -> list[dict[str, str]]:
    """Rows of random words, the first quarter a prompt; `lengths` draws the tokens of one, the end token counted."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        text = [f"w{draw.randrange(3, 512)}" for _ in range(lengths(draw) - 1)]
        rows.append({"prompt": " ".join(text[: len(text) // 4]), "completion": " " + " ".join(text[len(text) // 4 :])})
    return rows


def works(tiny: bool) -> dict[str, Work]:
    """What a step is: rows of one length, or of lengths as instruction data have them, 8 to 16 of them filling it."""
    long, unit = (4096, 1) if not tiny else (128, 32)
    ROWS["full"] = partial(words, lambda _: long // 2)
    ROWS["long"] = partial(words, lambda _: long)
    ROWS["mix"] = partial(words, lambda draw: min(long // 2, max(8, round(draw.lognormvariate(5.3, 0.8) / unit))))
    base = Work("full", STEPS, 2, device=device_name(), target_modules="all-linear", max_tokens=long)
    return {
        f"{long // 2}x2": base,
        f"{long}x1": replace(base, rows="long", rows_per_step=1),
        "mix": replace(base, rows="mix", rows_per_step=16),
    }


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ── sections: each yields (case, result) ────────────────────────────────────────────────────────────────────────

Cases = Iterator[tuple[str, dict[str, Any]]]


def section_card(section: Section) -> Cases:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    size, device = (64 if section.tiny else 8192), device_name()

    def seconds(work: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        for number in range(23):
            if number == 3:
                wait()
                began = time.perf_counter()
            work()
        wait()
        return (time.perf_counter() - began) / 20

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(a, compress_statistics=True, quant_type="nf4")
    half = a.half()
    yield "bf16 products", {"tflops": 2 * size**3 / seconds(lambda: a @ a) / 1e12}
    yield "fp16 products", {"tflops": 2 * size**3 / seconds(lambda: half @ half) / 1e12}
    yield "copies", {"gb_per_second": 2 * a.nbytes / seconds(a.clone) / 1e9}
    yield "dequantizing", {"gb_per_second": a.nbytes / seconds(lambda: dequantize_4bit(packed, state)) / 1e9}


def section_tests(section: Section) -> Cases:
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if section.tiny else [])]
    done = section.run(["-m", "pytest", "tests/test_gpu.py", *options])
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "tests", {"exit_code": done.returncode, "said": lines[-1], "failed_tests": failed}


def section_shape(section: Section) -> Cases:
    """Steps of one shape, then one of them by its parts."""
    for name, work in works(section.tiny).items():
        yield name, section.case("steps", work)


def section_peers(section: Section) -> Cases:
    sides = [side for side in ("trl", "unsloth") if importlib.util.find_spec(side)]
    for shape in SHAPES if not section.tiny else ["llama-3b"]:
        for name, work in works(section.tiny).items():
            with section.prepared(replace(work, model=str(section.model(shape)))) as folder:
                for side in ("lora", *sides):
                    left = section.left()
                    yield f"{shape} {name} {side}", measure(side, folder, left) if left > LEAST else LEFT_OUT


def section_modes(section: Section) -> Cases:
    work = next(iter(works(section.tiny).values()))
    modes: dict[str, Any] = {
        **{mode: {"train": {"gradient_checkpointing": mode}} for mode in ("none", "full", "offload")},
        "selective": {"train": {"gradient_checkpointing": "selective", "activation_memory": 1.0}},
        "compile": {"train": {"compile": True}},
        "fp16": {"dtype": "fp16"},
        **{name: {"train": {"optimizer": name}} for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")},
    }
    for name, more in modes.items():
        yield name, section.case("steps", replace(work, **more), "llama-3b")
    if importlib.util.find_spec("liger_kernel"):
        yield "liger", section.case("steps-liger", work, "llama-3b")


def section_longest(section: Section) -> Cases:
    mode = section.name.partition("-")[2] or "full"
    work = replace(next(iter(works(section.tiny).values())), train={"gradient_checkpointing": mode})
    for size in (8, 12, 16, 24) if not section.tiny else (8,):
        for shape in ("llama-8b", "llama-3b"):
            yield f"{shape} in {size} GB", section.case("longest", replace(work, most_gib=size * GB), shape)


def section_auto(section: Section) -> Cases:
    rows = {"micro_batch_size": "auto", "gradient_accumulation_steps": None, "batch_size": 16}
    work = replace(next(iter(works(section.tiny).values())), rows_per_step=16, steps=3, train=rows)
    for size in (None, 8):
        cap = None if size is None else size * GB
        yield f"in {size or 'all'} GB", section.case("steps", replace(work, most_gib=cap), "llama-3b")


SECTIONS: dict[str, Callable[[Section], Cases]] = {
    "card": section_card,
    "tests": section_tests,
    **dict.fromkeys(SHAPES, section_shape),
    "peers": section_peers,
    "modes": section_modes,
    **dict.fromkeys(("longest", "longest-offload"), section_longest),
    "auto": section_auto,
}


class Section:
    """One section at work: where its models are, and the time that is left to it."""

    def __init__(self, name: str, place: Path, tiny: bool):
        self.name, self.place, self.tiny = name, place, tiny
        self.ends = time.monotonic() + SECONDS

    def left(self) -> float:
        return self.ends - time.monotonic()

    def model(self, shape: str) -> Path:
        return make_model(shape, self.place, self.tiny)

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """A Python of its own, in the time that is left."""
        command = [sys.executable, *arguments]
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=self.left(), check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", "it was not done in the section's time")

    @contextmanager
    def prepared(self, work: Work) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as name:
            prepare_work(work, Path(name))
            yield Path(name)

    def case(self, kind: str, work: Work, shape: str = "") -> dict[str, Any]:
        """The result of `kind` in a process of its own, or why there is none."""
        with self.prepared(replace(work, model=str(self.model(shape or self.name)))) as folder:
            if self.left() < LEAST:
                return LEFT_OUT
            done = self.run([__file__, "--case", kind, "--out", str(folder)])
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": said[-1]}


# ── cases: each in a process of its own ─────────────────────────────────────────────────────────────────────────


def case_steps(folder: Path, work: Work, liger: bool = False) -> dict[str, Any]:
    """Speed, memory and its estimate, the time of the sixth step by part, losses."""
    import torch

    from lora_cli.training import loop

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    profile = torch.profiler.profile(acc_events=True)
    one_step, kept = loop.Run._one_step, []

    def watched(run: Any, step: int, *rest: Any) -> None:
        kept[:] = [run.session]
        if step != work.steps - 1:
            return one_step(run, step, *rest)
        with profile:
            one_step(run, step, *rest)
            if work.device == "cuda":
                torch.cuda.synchronize()

    with patch.object(loop.Run, "_one_step", watched):
        result = ours(folder, work)
    stamps, steps = result["stamps"], range(2, len(result["stamps"]))
    speeds = [result["tokens"][at] / (stamps[at] - stamps[at - 1]) for at in steps if at != work.steps - 2]
    session = kept[0]
    tokens, targets = (max(result[name]) for name in ("tokens", "targets"))
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_of_a_step": statistics.median(result["tokens"]),
        "peak_bytes": peak_memory_bytes(work.device),
        "estimated_bytes": estimate(folder, work, tokens, targets),
        "recomputed_blocks": sum(session.activations.recomputed),
        "product_flops_per_token": product_flops(session, targets / tokens),
        "parts": by_part(profile, work.device),
        "losses": result["losses"],
    }


def product_flops(session: Any, targets: float) -> float:
    """Of the products that no trainer can leave out: frozen layers forward and their input gradient, A and B, head."""
    from lora_cli.adapters.targets import linear_layers
    from lora_cli.adapters.trained import trained_parameters
    from lora_cli.base.linear import features

    sizes = [inputs * outputs for inputs, outputs in map(features, linear_layers(session.model).values())]
    head = session.model.get_output_embeddings().weight.numel()
    adapter = sum(parameter.numel() for parameter in trained_parameters(session.model))
    return 2 * (2 * sum(sizes) + 3 * adapter + 2 * targets * head)


def estimate(folder: Path, work: Work, tokens: int, targets: int) -> int:
    """What `lora init` would expect of this step, all of it in one micro-batch."""
    from lora_cli.adapters.targets import find_targets
    from lora_cli.planning.memory import estimate_memory, shape_of
    from lora_cli.planning.skeleton import look_at_model

    base = look_at_model(work.model)
    found = find_targets(base.skeleton, work.target_modules, rank=work.rank, alpha=work.alpha)
    train = recipe_of(work, folder, "run").train
    return estimate_memory(
        shape_of(base, {target.name: target.rank for target in found}),
        quantization=work.quantization,
        tokens=tokens,
        target_tokens=targets,
        gradient_checkpointing="none" if (mode := train.gradient_checkpointing) == "selective" else mode,
        optimizer_bytes=2 if "8bit" in train.optimizer else 8,
    ).total


def by_part(profile: Any, device: str) -> dict[str, float]:
    """Share of the time of kernels, or on a CPU of operations, by PARTS."""
    from torch.autograd import DeviceType

    totals = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages():
        if device == "cuda" and event.device_type != DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        totals[next(name for name, pattern in PARTS.items() if re.search(pattern, event.key, re.IGNORECASE))] += spent
    whole = sum(totals.values()) or 1.0
    return {name: spent / whole for name, spent in totals.items()}


def case_longest(folder: Path, work: Work) -> dict[str, Any]:
    """The most tokens of one row, all of them targets, that a step has memory for; to within a 64th."""
    import numpy as np

    from lora_cli.data.example import Example
    from lora_cli.training import loop

    found: list[int] = []

    class Found(Exception):
        pass

    def search(run: Any, *_: Any) -> None:
        def fits(tokens: int) -> bool:
            row = Example(np.arange(tokens) % 500 + 3, [(0, tokens, 1.0)])
            return run.micro_batches._trial([[row]], 1) is None

        least, most, limit = 0, 256, 512 if work.device == "cpu" else 131072
        while most <= limit and fits(most):
            least, most = most, 2 * most
        while most <= limit and most - least > most // 64:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        found.append(least)
        raise Found

    with patch.object(loop.Run, "_steps", search), suppress(Found):
        ours(folder, work)
    return {"tokens": found[0], "peak_bytes": peak_memory_bytes(work.device)}


CASES = {"steps": case_steps, "steps-liger": partial(case_steps, liger=True), "longest": case_longest}


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_section(name: str, place: Path, out: Path, tiny: bool) -> None:
    import torch

    device = device_name()
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ("-tiny" if tiny else "")
    cases: dict[str, Any] = {}
    for case, result in SECTIONS[name](Section(name, place, tiny)):
        cases[case] = result
        print(f"{name}  {case}  {json.dumps(result)}", flush=True)
    limits = json.loads(path.read_text())["cases"] if (path := out / f"{slug}-card.json").exists() else {}
    for result in cases.values():  # the least time of a step's matrix products, over the time that it took
        if "product_flops_per_token" in result and limits:
            least = result["product_flops_per_token"] / (limits["bf16 products"]["tflops"] * 1e12)
            result["share_of_product_limit"] = least * result["tokens_per_second"]
    result = {"card": card, "section": name, "tiny": tiny, "versions": versions(), "cases": cases}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{slug}-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{slug}-{name}.md").write_text(page(result), encoding="utf-8")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    for name in ("torch", "transformers", "bitsandbytes", "peft", "trl", "unsloth", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def page(result: dict[str, Any]) -> str:
    """The figures of a section as one table, a line a case; times by part below it."""
    cases = result["cases"]
    keys = list(dict.fromkeys(k for each in cases.values() for k, v in each.items() if not isinstance(v, dict | list)))
    named = {key: f"{key.removesuffix('_bytes')}, GiB" if key.endswith("_bytes") else key for key in keys}
    lines = [f"# {result['card']}: {result['section']}", "", ", ".join(" ".join(e) for e in result["versions"].items())]
    lines += ["", "| case | " + " | ".join(named.values()).replace("_", " ") + " |", "|---" * (len(keys) + 1) + "|"]
    for case, each in cases.items():
        shown = (each.get(k, "") if not k.endswith("_bytes") or k not in each else each[k] / 2**30 for k in keys)
        cells = (f"{v:,.4g}" if isinstance(v, float) else str(v).replace("|", "/") for v in shown)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    for case, each in cases.items():
        parts = ", ".join(f"{name} {share:.1%}" for name, share in each.get("parts", {}).items())
        lines += ["", f"{case}, the time by part: {parts}"] if parts else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the results go")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "gpu", help="where the models are made, once")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given.case:
        work = Work.read(given.out)
        if work.device == "cuda":
            cap_memory(work.most_gib)
        result = CASES[given.case](given.out, work)
        return print(json.dumps(result))
    if unknown := sorted(set(given.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if device_name() == "cpu" and not given.tiny:
        parser.error("torch finds no CUDA device here; --tiny runs everything with tiny models on a CPU")
    place = given.models / ("tiny" if given.tiny else "full")
    place.mkdir(parents=True, exist_ok=True)
    for name in given.sections or SECTIONS:
        run_section(name, place, given.out, given.tiny)


if __name__ == "__main__":
    main()
