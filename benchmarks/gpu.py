"""How fast and how lean training is on the GPU of this machine: `make gpu`, or one section at a time. Offline.

    python benchmarks/gpu.py [SECTION ...] [--tiny] [--out benchmarks/results]      all sections without a name

card       the card's own limits: matrix products, copies, dequantizing NF4
tests      the tests marked gpu
llama-8b, qwen-4b, llama-3b     steps of Llama-3.1-8B's, Qwen3-4B's and Llama-3.2-3B's shape: tokens a second, peak
           memory beside the estimate of `lora init`, the time by part, the distance to the card's limits
peers-llama-8b, …     the same rows and initial A in TRL + PEFT and in unsloth, where they are installed
fused      Llama-3B's shape as it is, compiled, with Liger's kernels where they are installed
modes      the same shape with each way to keep less, in fp16 with loss scaling, with paged optimizers
longest-full-llama-8b, longest-offload-llama-8b, …     the longest row that trains in 8, 12, 16 and 24 GB with
           gradient_checkpointing: full, or with the blocks' inputs in host memory
auto       micro_batch_size: auto where memory runs out for real

A section takes at most 8 minutes: what has not begun by then is left out, aloud. After each case it writes
<card>-<section>.json and a page of it, .md. Sections and cases are processes of their own, so that one that fails, or
memory of the GPU that it keeps, is no other's concern. Models have random NF4 weights, made here from their configs;
rank 16 on all linear layers. Rows are random words: two of 2,048 tokens a step, one of 4,096, or 16 of mixed lengths.
Everything is in the dtype that training picks for the card, bf16, or fp16 where it has none; each result names it. What
does not fit says so, and the next case follows. --tiny: the same with tiny models. A figure is only worth something
beside others of the same card and driver. Peak memory is what torch took of the GPU.
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
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from train import cap_memory, measure, ours, peak_memory_bytes, why_failed
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
    "attention": "flash|fmha|attention",  # before products: its kernels have cutlass in their names, too
    "matrix products": "gemm|cutlass|nvjet|xmma|::mm$|::addmm$|::bmm$",
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

    from lora_cli.base.device import DTYPES

    settings, dtype = SHAPES[shape] | (TINY if tiny else {}), DTYPES[card()[2]]
    config = AutoConfig.for_model(**settings, max_position_embeddings=131072, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(empty).__name__], dtype
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config.quantization_config = BitsAndBytesConfig(**stored, bnb_4bit_compute_dtype=dtype).to_dict()
    device, making = device_name(), place / f"{shape}.part"
    config.save_pretrained(making)
    torch.manual_seed(0)
    linear = {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    linear.discard("lm_head.weight")
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in empty.named_parameters():
        value = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(0.02)
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
    more: dict[str, Any] = {"dtype": card()[2], "device": device_name()}
    base = Work("full", STEPS, 2, target_modules="all-linear", max_tokens=long, **more)
    return {
        f"{long // 2}x2": base,
        f"{long}x1": replace(base, rows="long", rows_per_step=1),
        "mix": replace(base, rows="mix", rows_per_step=16),
    }


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def card() -> tuple[str, float, str]:
    """Its name, GiB of memory, and the dtype that training picks; asked in a process of its own, because whoever asks
    takes some of it. A CPU counts as a card without memory.
    """
    if device_name() == "cpu":
        return look("cpu")
    ask = "import json, sys; sys.path.insert(0, 'benchmarks'); import gpu; print(json.dumps(gpu.look('cuda')))"
    name, size, dtype = json.loads(subprocess.check_output([sys.executable, "-c", ask], cwd=ROOT, text=True))
    return name, size, dtype


def look(device: str) -> tuple[str, float, str]:
    import torch

    from lora_cli.base.device import DTYPES, pick_dtype

    picked = next(name for name, dtype in DTYPES.items() if dtype == pick_dtype("auto", torch.device(device))[0])
    if device == "cpu":
        return "cpu", 0.0, picked
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory / 2**30, picked


# ── sections: each yields (case, result) ────────────────────────────────────────────────────────────────────────

Cases = Iterator[tuple[str, dict[str, Any]]]


def section_card(section: Section) -> Cases:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lora_cli.base.device import DTYPES

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

    a = torch.randn(size, size, device=device, dtype=DTYPES[card()[2]])
    packed, state = quantize_4bit(a, compress_statistics=True, quant_type="nf4")
    for name in dict.fromkeys((card()[2], "fp16")):
        of = a.to(DTYPES[name])
        yield f"{name} products", {"tflops": 2 * size**3 / seconds(lambda of=of: of @ of) / 1e12}
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
    model = str(section.model(section.name.removeprefix("peers-")))
    for name, work in works(section.tiny).items():
        with section.prepared(replace(work, model=model)) as folder:
            for side in ("lora", *sides):
                left = section.left()
                result = measure(side, folder, left) if left > LEAST else LEFT_OUT
                yield f"{name} {side}", {"dtype": work.dtype} | result


def section_fused(section: Section) -> Cases:
    yield from _with_each(section, {"neither": {}, "compile": {"compile": True}})
    if importlib.util.find_spec("liger_kernel") and device_name() == "cuda":
        yield from _with_each(section, {"liger": {"liger_kernel": True}})


def _with_each(section: Section, modes: dict[str, dict[str, Any]]) -> Cases:
    work = next(iter(works(section.tiny).values()))
    for name, train in modes.items():
        yield name, section.case("steps", replace(work, train=train), "llama-3b")


def section_modes(section: Section) -> Cases:
    modes: dict[str, dict[str, Any]] = {
        **{mode: {"gradient_checkpointing": mode} for mode in ("none", "full", "offload")},
        "selective": {"gradient_checkpointing": "selective", "activation_memory": 1.0},
        **{name: {"optimizer": name} for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")},
    }
    yield from _with_each(section, modes)
    work = next(iter(works(section.tiny).values()))
    yield "fp16", section.case("steps", replace(work, dtype="fp16"), "llama-3b")


def section_longest(section: Section) -> Cases:
    _, mode, shape = section.name.split("-", 2)
    work = replace(next(iter(works(section.tiny).values())), train={"gradient_checkpointing": mode})
    found = [size for size in (8, 12, 16, 24) if size * GB < card()[1]] if not section.tiny else [8]
    sizes = found or [None]  # a smaller card
    for at, size in enumerate(sizes):
        cap = None if size is None else size * GB
        left = 1 / (len(sizes) - at)
        yield f"in {size or 'all'} GB", section.case("longest", replace(work, most_gib=cap), shape, left)


def section_auto(section: Section) -> Cases:
    rows = {"micro_batch_size": "auto", "gradient_accumulation_steps": None, "batch_size": 16}
    work = replace(next(iter(works(section.tiny).values())), rows_per_step=16, steps=3, train=rows)
    for size in (None, 8) if section.tiny or card()[1] > 8 * GB else (None,):
        cap = None if size is None else size * GB
        yield f"in {size or 'all'} GB", section.case("steps", replace(work, most_gib=cap), "llama-3b")


SECTIONS: dict[str, Callable[[Section], Cases]] = {
    "card": section_card,
    "tests": section_tests,
    **dict.fromkeys(SHAPES, section_shape),
    **{f"peers-{shape}": section_peers for shape in SHAPES},
    "fused": section_fused,
    "modes": section_modes,
    **{
        f"longest-{mode}-{shape}": section_longest for mode in ("full", "offload") for shape in ("llama-8b", "llama-3b")
    },
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
        """Made in a process of its own: this one keeps no memory of the GPU, which its cases measure."""
        if not (self.place / shape).exists():
            place = ["--models", str(self.place.parent), *(["--tiny"] if self.tiny else [])]
            done = self.run([__file__, "--make", shape, *place])
            if done.returncode:
                raise RuntimeError(f"{shape} cannot be made: {done.stderr[-2000:]}")
        return self.place / shape

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

    def case(self, kind: str, work: Work, shape: str = "", share: float = 1.0) -> dict[str, Any]:
        """The result of `kind` in a process of its own, or why there is none. share: of the time that is left."""
        with self.prepared(replace(work, model=str(self.model(shape or self.name)))) as folder:
            if self.left() < LEAST:
                return LEFT_OUT
            done = self.run([__file__, "--case", kind, "--out", str(folder), "--seconds", str(share * self.left())])
        found = [line for line in done.stdout.splitlines() if line.startswith("{")]
        ran = done.returncode == 0 and found
        result = json.loads(found[-1]) if ran else why_failed(done.returncode, done.stderr)
        return {"dtype": work.dtype} | result


# ── cases: each in a process of its own ─────────────────────────────────────────────────────────────────────────


def case_steps(folder: Path, work: Work, _: float) -> dict[str, Any]:
    """Speed, memory and its estimate, the time of the last step but one by part, losses."""
    import torch

    from lora_cli.training import loop

    profile = torch.profiler.profile(acc_events=True)
    one_step, kept = loop.Run._one_step, []

    def watched(run: Any, step: int, *rest: Any) -> None:
        kept[:] = [run.session, run.state.parts]
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
    derived: dict[str, Callable[[], Any]] = {
        "estimated_bytes": lambda: estimate(folder, work, tokens, targets),
        "product_flops_per_token": lambda: product_flops(session, targets / tokens),
        "parts": lambda: by_part(profile, work.device),
    }
    found = {
        "tokens_per_second": statistics.median(speeds),
        "tokens_of_a_step": statistics.median(result["tokens"]),
        "peak_bytes": peak_memory_bytes(work.device),
        "recomputed_blocks": sum(session.activations.recomputed),
        "losses": result["losses"],
        **({"each_micro_batch_cut_into": kept[1]} if kept[1] > 1 else {}),  # the estimate is of one that is not
    }
    for name, compute in derived.items():  # what was measured counts without them
        try:
            found[name] = compute()
        except Exception as error:
            found["missing"] = f"{found.get('missing', '')} {name}: {type(error).__name__}: {error}"[:400]
    return found


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


def case_longest(folder: Path, work: Work, seconds: float) -> dict[str, Any]:
    """The most tokens of one row, all of them targets, that a step has memory for; to within a 64th, or as near as
    there is time for: then up to how many it may be.
    """
    import numpy as np
    import torch

    from lora_cli.base.device import free_memory_bytes
    from lora_cli.data.example import Example
    from lora_cli.training import loop

    found: list[int] = []
    longest, ends = [0.0], time.monotonic() + seconds - LEAST  # of a trial

    class Found(Exception):
        pass

    def search(run: Any, *_: Any) -> None:
        def fits(tokens: int) -> bool:
            began, host = time.monotonic(), free_memory_bytes(torch.device("cpu"))
            if (
                run.session.activations.host_bytes(tokens, pinned=True) > 0.9 * host
            ):  # where the system kills instead of refusing
                return False
            row = Example(np.arange(tokens) % 500 + 3, [(0, tokens, 1.0)])
            fit = run.micro_batches._trial([[row]], 1) is None
            longest[0] = max(longest[0], time.monotonic() - began)
            return fit

        def in_time() -> bool:  # a row twice as long takes up to four times as long
            return time.monotonic() + 4 * longest[0] < ends

        least, most, limit = 0, 256, 512 if work.device == "cpu" else 131072
        while most <= limit and in_time() and fits(most):
            least, most = most, 2 * most
        while most <= limit and in_time() and most - least > most // 64:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        found.extend((least, most))
        raise Found

    with patch.object(loop.Run, "_steps", search), suppress(Found):
        ours(folder, work)
    least, most = found
    if not least:
        return {"failed": f"does not fit: not a row of {most} tokens"}
    exact = {} if most - least <= most // 64 or work.device == "cpu" else {"not_tried_from": most}
    return {"tokens": least, "peak_bytes": peak_memory_bytes(work.device)} | exact


CASES = {"steps": case_steps, "longest": case_longest}


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_section(name: str, place: Path, out: Path, tiny: bool) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", card()[0].lower()).strip("-") + ("-tiny" if tiny else "")
    out.mkdir(parents=True, exist_ok=True)
    limits = json.loads(path.read_text())["cases"] if (path := out / f"{slug}-card.json").exists() else {}
    whole: dict[str, Any] = {"card": card()[0], "section": name, "tiny": tiny, "versions": versions(), "cases": {}}
    for case, result in SECTIONS[name](Section(name, place, tiny)):
        limit = limits.get(f"{result.get('dtype')} products")
        if "product_flops_per_token" in result and limit:  # the least time of a step's matrix products, over its time
            least = result["product_flops_per_token"] / (limit["tflops"] * 1e12)
            result["share_of_product_limit"] = least * result["tokens_per_second"]
        whole["cases"][case] = result
        print(f"{name}  {case}  {json.dumps({key: each for key, each in result.items() if key != 'log'})}", flush=True)
        (out / f"{slug}-{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (out / f"{slug}-{name}.md").write_text(page(whole), encoding="utf-8")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver and power limit"] = said.splitlines()[0]
    for name in ("torch", "triton", "transformers", "bitsandbytes", "peft", "trl", "unsloth", "liger-kernel"):
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given.case:
        work = Work.read(given.out)
        if work.device == "cuda":
            cap_memory(work.most_gib)
        result = CASES[given.case](given.out, work, given.seconds)
        return print(json.dumps(result))
    if unknown := sorted(set(given.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if device_name() == "cpu" and not given.tiny:
        parser.error("torch finds no CUDA device here; --tiny runs everything with tiny models on a CPU")
    place = given.models.resolve() / ("tiny" if given.tiny else "full")
    place.mkdir(parents=True, exist_ok=True)
    if given.make:
        make_model(given.make, place, given.tiny)
        return
    names = given.sections or list(SECTIONS)
    if len(names) == 1:
        return run_section(names[0], place, given.out, given.tiny)
    own = ["--out", str(given.out), "--models", str(given.models), *(["--tiny"] if given.tiny else [])]
    codes = [subprocess.run([sys.executable, __file__, name, *own], check=False).returncode for name in names]
    if failed := [name for name, code in zip(names, codes, strict=True) if code]:
        sys.exit(f"sections that failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
