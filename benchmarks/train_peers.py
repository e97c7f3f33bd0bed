"""What benchmarks/train.py compares lora with: each peer on the same rows, set as its own guides set it.

Each function trains the work in a folder and returns, one value a step: losses, tokens (padding not counted), targets
(tokens that carry loss), both counted in the batches that the model was given, and stamps (clock at the end of a step).

TRL could also lay rows side by side, with `packing` or `padding_free`. Both are left out: only flash attention keeps
the rows of one sequence apart there, and it needs a GPU; with the attention that a CPU has, rows would see each other.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from train_rows import Work, steps_of

Result = dict[str, list[Any]]


def trl(folder: Path, work: Work, by_length: bool = False, fp32_adapter: bool = False, model: Any = None) -> Result:
    """TRL's SFTTrainer over PEFT. It pads each batch to its longest row; logits are made in chunks (loss_type nll)."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports] - an extra of its own

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    ordered = [row for step in steps_of(folder) for row in step]
    data = Dataset.from_list([rows[row["row"] - 1] for row in ordered])
    settings: dict[str, Any] = trainer_settings(folder, work) | {
        "max_length": work.max_tokens,
        "gradient_checkpointing": work.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if work.checkpointing else None,
        "bf16": work.dtype == "bf16",
        "fp16": work.dtype == "fp16",
        "train_sampling_strategy": "group_by_length" if by_length else "sequential",
    }
    trainer = counting(SFTTrainer)(
        model=model or base_model(work),
        args=SFTConfig(**settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=None if model else adapter_settings(work),
    )
    assert trainer.train_dataset["input_ids"] == [row["ids"] for row in ordered], "TRL makes the same tokens"
    if fp32_adapter:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    return run(trainer, work)


def trl_by_length(folder: Path, work: Work) -> Result:
    """The same with rows of similar length in a step: less padding, another order."""
    return trl(folder, work, by_length=True)


def trl_fp32_adapter(folder: Path, work: Work) -> Result:
    """The same with A and B in fp32, as lora and PEFT keep them.

    Over a quantized model SFTTrainer turns A and B into bf16, so that each update of the optimizer is rounded to eight
    bits, and computes their products in bf16 whatever the dtype of the model. This takes it back, so that curves
    compare the same mathematics.
    """
    return trl(folder, work, fp32_adapter=True)


def unsloth(folder: Path, work: Work) -> Result:
    """unsloth as its notebooks use it: its kernels, its checkpointing, TRL's trainer. It needs a GPU: not tried yet."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports] - first, because it changes the others

    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model, _ = FastLanguageModel.from_pretrained(work.model, max_seq_length=work.max_tokens, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        *(model, work.rank, parts[:4] if work.target_modules == "attention" else parts),
        **{"lora_alpha": work.alpha, "lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": "unsloth"},
    )
    return trl(folder, work, model=model)


def peft(folder: Path, work: Work) -> Result:
    """The plain loop of PEFT's and bitsandbytes' guides: no trainer, autocast in bf16, the model's own loss."""
    import torch
    from peft import get_peft_model

    model = get_peft_model(base_model(work), adapter_settings(work))
    same_initial_A(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.rate, weight_decay=0.0, fused=True)
    model.train()
    result: Result = {"losses": [], "tokens": [], "targets": [], "stamps": []}
    now = time.monotonic
    for rows in steps_of(folder):
        batch = padded(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, work.clip)
        optimizer.step()
        optimizer.zero_grad()
        count(result, batch, loss.item())
        result["stamps"].append(now())
    return result


# ── what they share ─────────────────────────────────────────────────────────────────────────────────────────────


def base_model(work: Work) -> Any:
    """The base model as QLoRA's guides load it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[work.dtype]
    stored = "quantization_config" in json.loads((Path(work.model) / "config.json").read_text(encoding="utf-8"))
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=dtype,
        device_map={"": 0 if work.device == "cuda" else "cpu"},
        attn_implementation="sdpa",
        # None would take away what a stored one says.
        **({"quantization_config": quantized} if work.quantization == "nf4" and not stored else {}),
    )


def adapter_settings(work: Work) -> Any:
    from peft import LoraConfig

    gpt2 = "gpt2" in Path(work.model).name
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention if work.target_modules == "attention" else work.target_modules  # PEFT knows all-linear too
    return LoraConfig(
        r=work.rank,
        lora_alpha=work.alpha,
        target_modules=r".*\.attn\.(c_attn|c_proj)" if gpt2 else targets,
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
    )


def same_initial_A(model: Any) -> None:
    """PEFT's A, drawn as lora draws it with seed 0: the same numbers in the same order of layers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of some rows, each as long as the longest: (rows, longest)."""
    import torch

    width = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        length, prompt = len(row["ids"]), row["prompt"]
        ids[at, :length] = torch.tensor(row["ids"])
        labels[at, prompt:length] = ids[at, prompt:length]
        mask[at, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def count(result: Result, batch: Any, loss: float) -> None:
    result["losses"].append(loss)
    result["tokens"].append(int(batch["attention_mask"].sum()))
    result["targets"].append(int((batch["labels"][:, 1:] != -100).sum()))


def trainer_settings(folder: Path, work: Work) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": work.rows_per_step,
        "max_steps": work.steps,
        "learning_rate": work.rate,
        "max_grad_norm": work.clip,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "use_cpu": work.device == "cpu",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **work.peer,
    }


def counting(kind: Any) -> Any:
    """A trainer class that remembers what each step was given."""

    class Counting(kind):
        result: Result

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            batch = dict(inputs)
            loss = super().training_step(model, inputs, *arguments, **options)
            count(self.result, batch, float(loss.detach()))
            return loss

    return Counting


def run(trainer: Any, work: Work) -> Result:
    """Train from lora's initial A, with the clock read at the end of every step."""
    import torch
    from transformers import TrainerCallback

    result: Result = {"losses": [], "tokens": [], "targets": [], "stamps": []}
    now = time.monotonic

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if work.device == "cuda":
                torch.cuda.synchronize()
            result["stamps"].append(now())

    trainer.result = result  # where counting() puts what it counts
    trainer.add_callback(Clock())
    same_initial_A(trainer.model)
    trainer.train()
    return result
