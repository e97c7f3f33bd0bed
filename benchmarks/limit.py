"""Where the time and the memory of a training step go: how far from the matrix products alone, how memory grows.

    python benchmarks/limit.py [SECTION ...] [--steps 8] [--json FILE]

step        step time over the time of the step's own matrix products (same shapes, same dtype, timed between the
            steps), and what else the time goes to
step-fp32   the same with the base unquantized and everything in fp32, for CPUs without bf16 instructions
tokens      memory beyond the weights, for micro-batches of 512 to 8,192 tokens in rows of at most 512
vocabulary  memory of the loss beyond head and hidden states, for vocabularies of 32k to 256k, on synthetic heads
compile     the same step with train.compile, its warm-up by itself
cold        from the start of `lora train` to the end of the first step, over the libraries' import, loading, and steps

Work: SmolLM2-135M-Instruct in NF4 with double quantization, rank 16 on q, k, v and o, bf16, 8 rows of 64 to 500 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
LENGTHS = (500, 420, 330, 260, 200, 150, 100, 64)
PROMPT = 20  # tokens of each row that carry no loss
# Which functions of a profile belong together: what they spend, matrix products inside them taken out.
PARTS = {
    "attention": ("_PerExample", "_PerExampleBackward"),
    "norms and activations": ("_RMSNorm", "_RMSNormBackward", "_GatedProduct", "_GatedProductBackward"),
    "loss": ("_LinearCrossEntropy",),
    "dequantizing and quantized layers": ("MatMul4Bit", "MatMul4BitBackward"),
    "LoRA": ("_SharedInput", "_SharedInputBackward", "_AddUpdate", "_AddUpdateBackward"),
}


class Step:
    """One training step on the real model, as the loop does it."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, compiled: bool = False, fp32: bool = False):
        import numpy as np
        import torch

        from lora_cli.adapters.attach import attach
        from lora_cli.adapters.beside import join, watch_inputs
        from lora_cli.adapters.targets import block_lists, find_targets
        from lora_cli.adapters.trained import parameters_by_group, trained_parameters
        from lora_cli.base.compiled import compile_blocks
        from lora_cli.base.load import load_model, quiet_libraries
        from lora_cli.base.recompute import save_only_inputs
        from lora_cli.base.source import find_base
        from lora_cli.data.example import Example

        quiet_libraries()
        self.device = torch.device("cpu")
        source = find_base(str(MODEL), None)
        self.dtype = torch.float32 if fp32 else torch.bfloat16
        quantization = "none" if fp32 else "nf4"
        self.model = load_model(source, quantization=quantization, dtype=self.dtype, device=self.device)
        self.layers = attach(self.model, find_targets(self.model, "attention", rank=16, alpha=32))
        for parameter in parameters_by_group(self.model)["B"]:
            torch.nn.init.normal_(parameter, std=0.01)
        if compiled:
            blocks = [block for name in block_lists(self.model) for block in self.model.get_submodule(name)]
            compile_blocks(blocks, self.device, print)
        else:
            save_only_inputs(self.model)
        drawn = np.random.default_rng(0)
        self.examples = [Example(drawn.integers(0, 49152, n), [(min(PROMPT, n - 1), n, 1.0)]) for n in lengths]
        self.parameters = trained_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.model.train()
        with watch_inputs(self.layers.values()) as beside, torch.no_grad():
            self.model(input_ids=torch.arange(9)[None], use_cache=False)
        join(beside, self.layers.values())

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def targets(self) -> int:
        return sum(example.targets for example in self.examples)

    def run(self, record: Callable[[str], Any] | None = None) -> float:
        """Seconds of one step. record: a context for each stage, by its name."""
        from contextlib import nullcontext

        import torch

        from lora_cli.adapters.trained import cast_once
        from lora_cli.data.batches import collate
        from lora_cli.evaluation.loss import summed_loss

        stage = record or (lambda _name: nullcontext())
        started = time.perf_counter()
        with stage("data"):
            batch = collate(self.examples, packed=True, pad_id=0, device=self.device)
        with stage("forward and backward"), cast_once(self.layers, self.dtype):
            (summed_loss(self.model, batch) / self.targets).backward()
        with stage("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - started


def products(step: Step) -> Callable[[], float]:
    """Times the step's own matrix products: base forward and input gradient, LoRA's five, the head on its targets."""
    import torch

    from lora_cli.adapters.targets import linear_layers
    from lora_cli.base.linear import features

    tokens, targets = step.tokens, step.targets
    head = step.model.get_output_embeddings().weight
    made: dict[tuple[int, int], Any] = {}

    def matrix(rows: int, columns: int) -> Any:
        return made.setdefault((rows, columns), torch.randn(rows, columns, dtype=step.dtype))

    shapes = []  # (left, right) of each product
    for layer in linear_layers(step.model).values():
        inputs, outputs = features(layer)
        shapes += [((tokens, inputs), (inputs, outputs)), ((tokens, outputs), (outputs, inputs))]
    for layer in step.layers.values():
        shapes_of = {name: parameter.shape for name, parameter in layer.state().items()}
        (rank, inputs), outputs = shapes_of["lora_A"], shapes_of["lora_B"][0]
        shapes += [((tokens, inputs), (inputs, rank)), ((tokens, rank), (rank, outputs))]  # forward
        shapes += [((tokens, outputs), (outputs, rank)), ((tokens, rank), (rank, inputs))]  # gradient of the input
        shapes += [((rank, tokens), (tokens, inputs)), ((outputs, tokens), (tokens, rank))]  # of A and B
    pairs = [(matrix(*left), matrix(*right)) for left, right in shapes]
    hidden, logits = matrix(targets, head.shape[1]), 320  # targets of a chunk of 64 MiB

    def run() -> float:
        started = time.perf_counter()
        for left, right in pairs:
            torch.mm(left, right)
        for start in range(0, targets, logits):
            made_logits = hidden[start : start + logits] @ head.T
            torch.mm(made_logits, head)
        return time.perf_counter() - started

    return run


def section_step(steps: int, compiled: bool = False, fp32: bool = False) -> dict[str, Any]:
    import torch

    step = Step(compiled=compiled, fp32=fp32)
    limit = products(step)
    warm_up = step.run()
    limit()
    step.run()
    seconds, limits = [], []
    for _ in range(steps):
        seconds.append(step.run())
        limits.append(limit())
    result: dict[str, Any] = {
        "tokens": step.tokens,
        "targets": step.targets,
        "first_step_seconds": warm_up,
        "step_seconds": statistics.median(seconds),
        "product_seconds": statistics.median(limits),
        "ratio": statistics.median(a / b for a, b in zip(seconds, limits, strict=True)),
        "tokens_per_second": step.tokens / statistics.median(seconds),
        "peak_memory_bytes": status("VmHWM"),
    }
    if not compiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step.run(torch.profiler.record_function)
        result["parts"] = parts(profile, limits[-1])
    return result


def section_step_fp32(steps: int) -> dict[str, Any]:
    return section_step(steps, fp32=True)


def parts(profile: Any, products_seconds: float) -> dict[str, float]:
    """Share of a profiled step by what it was spent on."""
    events = profile.events()
    totals: dict[str, float] = {}

    def spent(event: Any) -> float:
        """Microseconds of an event without the matrix products in it."""
        inside = sum(spent_on_products(child) for child in event.cpu_children)
        return event.cpu_time_total - inside

    def spent_on_products(event: Any) -> float:
        if event.name in ("aten::mm", "aten::addmm"):
            return event.cpu_time_total
        return sum(spent_on_products(child) for child in event.cpu_children)

    whole = 0.0
    for event in events:
        if event.name in ("data", "forward and backward", "optimizer"):
            whole += event.cpu_time_total
        if event.name in ("data", "optimizer"):
            totals[event.name] = totals.get(event.name, 0) + event.cpu_time_total
        if event.name in ("aten::mm", "aten::addmm"):
            totals["matrix products"] = totals.get("matrix products", 0) + event.cpu_time_total
        for name, functions in PARTS.items():
            if event.name in functions:
                totals[name] = totals.get(name, 0) + spent(event)
    totals["residual sums, rotary embedding, autograd, Python"] = whole - sum(totals.values())
    return {name: each / whole for name, each in sorted(totals.items(), key=lambda item: -item[1])}


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


def section_tokens(_steps: int) -> dict[str, Any]:
    return {str(tokens): alone("one-size", tokens)["bytes"] for tokens in (512, 1024, 2048, 4096, 8192)}


def one_size(tokens: int) -> dict[str, Any]:
    step = Step((512,) * (tokens // 512))
    before = status("VmRSS")
    step.run()
    return {"bytes": status("VmHWM") - before}


def section_vocabulary(_steps: int) -> dict[str, Any]:
    return {str(size): alone("one-vocabulary", size)["bytes"] for size in (32_000, 64_000, 128_000, 256_000)}


def one_vocabulary(size: int) -> dict[str, Any]:
    import torch

    from lora_cli.base.cross_entropy import LogitRule, linear_cross_entropy

    head = torch.nn.Linear(576, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(2048, 576).bfloat16().requires_grad_()
    targets = torch.randint(size, (2048,))
    before = status("VmRSS")
    linear_cross_entropy(head, hidden, targets, rule=LogitRule())[0].backward()
    return {"bytes": status("VmHWM") - before}


def section_compile(steps: int) -> dict[str, Any]:
    return section_step(steps, compiled=True)


# ── the first step ──────────────────────────────────────────────────────────────────────────────────────────────

IMPORTS = (
    "import torch, accelerate, bitsandbytes, pyarrow, tokenizers; from accelerate import Accelerator; "
    "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig; "
    "from transformers.models.llama import modeling_llama; import transformers.integrations.bitsandbytes"
)


def section_cold(steps: int) -> dict[str, Any]:
    from train_rows import Work, prepare_work, recipe_of

    from lora_cli.recipe import dump_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = Work("long", steps=max(steps, 4), rows_per_step=8)
        prepare_work(work, folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe_of(work, folder, "run")))
        imports = statistics.median(timed_import() for _ in range(3))
        loading = statistics.median(alone("one-loading", 0)["seconds"] for _ in range(3))
        metrics = folder / "run" / "metrics.jsonl"
        command = [str(Path(sys.executable).parent / "lora"), "train", str(folder / "recipe.yaml")]
        started = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
            while not (metrics.exists() and metrics.stat().st_size) and running.poll() is None:
                time.sleep(0.005)
            first = time.perf_counter() - started
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    warm = statistics.median(line["seconds"] * lines[0]["tokens"] / line["tokens"] for line in lines[1:])
    return {
        "first_step_ends_after_seconds": first,
        "import_seconds": imports,
        "loading_seconds": loading,
        "first_step_seconds": lines[0]["seconds"],
        "warm_step_seconds": warm,  # for as many tokens as the first
        "bound_seconds": imports + loading + 2 * warm,
    }


def timed_import() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - started


def one_loading(_value: int) -> dict[str, Any]:
    import torch

    from lora_cli.base.load import load_model, quiet_libraries
    from lora_cli.base.source import find_base

    exec(IMPORTS)
    quiet_libraries()
    source = find_base(str(MODEL), None)
    started = time.perf_counter()
    load_model(source, quantization="nf4", dtype=torch.bfloat16, device=torch.device("cpu"))
    return {"seconds": time.perf_counter() - started}


# ── running and showing ─────────────────────────────────────────────────────────────────────────────────────────


def alone(name: str, value: int) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, str(value)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


SECTIONS = {
    "step": section_step,
    "step-fp32": section_step_fp32,
    "tokens": section_tokens,
    "vocabulary": section_vocabulary,
    "compile": section_compile,
    "cold": section_cold,
}
ALONE = {"one-size": one_size, "one-vocabulary": one_vocabulary, "one-loading": one_loading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        name, value = arguments.alone
        print(json.dumps(ALONE[name](int(value)) if name in ALONE else SECTIONS[name](int(value))))
        return
    if unknown := sorted(set(arguments.sections) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    sys.path.insert(0, str(ROOT / "scripts"))
    from real_model import make_real_model

    make_real_model(MODEL, ROOT / "build" / "downloads")
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for name in arguments.sections or SECTIONS:
        in_own_process = name in ("step", "step-fp32", "compile")
        results[name] = alone(name, arguments.steps) if in_own_process else SECTIONS[name](arguments.steps)
        show(name, results[name])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}")
    if name in ("tokens", "vocabulary"):
        smallest = next(iter(result.values()))
        for size, held in result.items():
            print(f"  {int(size):>8,} {held / 2**20:8,.0f} MiB  {held / smallest:5.2f} ×")
        first, *_, last = result
        grown = (result[last] / result[first]) / (int(last) / int(first) if name == "tokens" else 1)
        print(f"  growth over {'linear' if name == 'tokens' else 'none'}: {grown:.2f} ×")
        return
    for key, value in result.items():
        if key == "parts":
            for part, share in value.items():
                print(f"    {share:6.1%}  {part}")
        else:
            unit = (value / 2**20, "MiB") if key.endswith("bytes") else (value, "")
            print(f"  {key:32} {unit[0]:10,.3f} {unit[1]}")
    if name == "cold":
        print(f"  within the bound by {result['first_step_ends_after_seconds'] / result['bound_seconds']:.2f} ×")


if __name__ == "__main__":
    main()
