"""Training side by side: lora against TRL + PEFT, on the same rows, in the same order, from the same initial A.

    python benchmarks/train_vs_trl.py [--steps 30] [--json result.json]

Work: SmolLM2-135M-Instruct in NF4 with double quantization, rank 16 on q, k, v and o, 8 instruction rows of at most 512
tokens a step, AdamW at a constant rate, no gradient checkpointing. Rows are docstrings of Python's standard library, so
that lengths are those of real text and nothing is downloaded but the model. Each side runs in a process of its own.
Real tokens are those of the rows, padding not counted. Peak memory is the process's largest resident size.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
ROWS_PER_STEP, MAX_TOKENS, RATE, CLIP = 8, 512, 2e-4, 1.0
MODULES = "argparse ast asyncio calendar collections csv datetime decimal difflib email fractions functools heapq http "
MODULES += "inspect itertools json logging math os pathlib pickle random re shutil socket sqlite3 statistics string "
MODULES += "subprocess tarfile tempfile textwrap threading time tokenize traceback types typing unittest uuid zipfile"


def rows(count: int, tokenizer: Any) -> list[dict[str, str]]:
    """Questions about functions and classes of the standard library, with their docstrings as answers."""
    found: dict[str, str] = {}
    for module in MODULES.split():
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            text = inspect.getdoc(thing) if callable(thing) and not name.startswith("_") else None
            if text and len(text) > 40 and str(getattr(thing, "__module__", "")).split(".")[0] == module:
                found[f"What does {module}.{name} do in Python?\n"] = text
    made = []
    for prompt, text in sorted(found.items()):
        ids = tokenizer(text)["input_ids"][: MAX_TOKENS - 40]
        made.append({"prompt": prompt, "completion": tokenizer.decode(ids).strip()})
    import random

    random.Random(0).shuffle(made)
    if len(made) < count:
        raise SystemExit(f"the standard library gives only {len(made)} rows, {count} are needed")
    return made[:count]


def recipe_of(folder: Path, steps: int) -> Any:
    from lora_cli.recipe import Recipe

    values = {
        "base_model": str(MODEL),
        "quantization": "nf4",
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": MAX_TOKENS, "packing": False},
        "train": {
            "micro_batch_size": ROWS_PER_STEP,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup_ratio": 0,
            "max_grad_norm": CLIP,
        },
        "output": str(folder / "run"),
    }
    return Recipe.model_validate(values)


def ours(folder: Path, steps: int) -> dict[str, Any]:
    from rich.console import Console

    from lora_cli.base.load import quiet_libraries
    from lora_cli.training.loop import train

    quiet_libraries()
    train(recipe_of(folder, steps), Console(stderr=True))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [line["seconds"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
    }


def trl(folder: Path, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=quantized, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="sdpa"
    )
    stored = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    data = Dataset.from_list([stored[index] for index in json.loads((folder / "order.json").read_text())])

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.monotonic() - self.started)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    clock = Clock()
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=ROWS_PER_STEP,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=CLIP,
            max_length=MAX_TOKENS,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            optim="adamw_torch",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    same_initial_A(trainer.model)
    trainer.train()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    tokens = [sum(lengths[at : at + ROWS_PER_STEP]) for at in range(0, steps * ROWS_PER_STEP, ROWS_PER_STEP)]
    return {"losses": clock.losses[:steps], "seconds": clock.seconds, "tokens": tokens}


def same_initial_A(model: Any) -> None:
    """PEFT's A, drawn as lora draws it with seed 0: the same numbers in the same order of layers."""
    import math

    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def measure(side: str, folder: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True)
    result = json.loads((folder / f"{side}.json").read_text())
    speeds = [tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"], strict=True)][1:]
    totals = {"last_loss": result["losses"][-1], "all_tokens": sum(result["tokens"])}
    return result | totals | {"tokens_per_second": statistics.median(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = {"ours": ours, "trl": trl}[arguments.side](arguments.folder, arguments.steps)
        result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (arguments.folder / f"{arguments.side}.json").write_text(json.dumps(result))
        return
    result = compare(arguments.steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(steps: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    from real_model import make_real_model
    from transformers import AutoTokenizer

    from lora_cli.data.prepare import prepare

    make_real_model(MODEL, ROOT / "build" / "downloads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        made = rows(steps * ROWS_PER_STEP, tokenizer)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        recipe = recipe_of(folder, steps)
        order = prepare(recipe, tokenizer).order(recipe)
        sequence = [index for step in range(1, steps + 1) for batch in order.step(step) for index in batch]
        (folder / "order.json").write_text(json.dumps(sequence))
        sides = {side: measure(side, folder, steps) for side in ("trl", "ours")}
    ours, trl = sides["ours"], sides["trl"]
    gap = max(abs(a - b) / b for a, b in zip(ours["losses"], trl["losses"], strict=True))
    print(f"\n{'':22}{'lora':>12}{'TRL + PEFT':>14}{'ratio':>10}")
    for name, key, unit, digits in (
        ("real tokens/s", "tokens_per_second", 1, 0),
        ("peak memory, GiB", "peak_memory_bytes", 2**30, 2),
        (f"loss at step {steps}", "last_loss", 1, 4),
        ("real tokens", "all_tokens", 1, 0),
    ):
        a, b = ours[key] / unit, trl[key] / unit
        print(f"{name:22}{a:12.{digits}f}{b:14.{digits}f}{a / b:10.3f}")
    print(f"largest difference of the loss at any step: {gap:.2%}")
    return sides | {"largest_loss_gap": gap}


if __name__ == "__main__":
    main()
