"""The work of benchmarks/train.py: rows made of Python's standard library, and the recipe that lora trains them with.

Nothing is downloaded but the model. Every side is given the same folder:

work.json     what to train, and how
rows.jsonl    prompt and completion, as a person would write them
tokens.json   the same rows in the order of the steps: ids, and where the completion begins
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
CHECKPOINTED = "full"  # train.gradient_checkpointing where activations are recomputed
MODULES = "argparse ast asyncio calendar collections configparser contextlib copy csv datetime decimal difflib email "
MODULES += "enum fractions ftplib functools gettext heapq html http imaplib inspect ipaddress itertools json logging "
MODULES += "mailbox math multiprocessing os pathlib pdb pickle platform random re shutil smtplib socket sqlite3 ssl "
MODULES += "statistics string subprocess tarfile tempfile textwrap threading time tokenize traceback turtle types "
MODULES += "typing unittest urllib uuid xml zipfile"


@dataclass(frozen=True)
class Work:
    """What every side trains. Lengths in tokens, the end token counted."""

    rows: str  # one of ROWS
    steps: int
    rows_per_step: int
    dtype: str = "bf16"
    quantization: str = "nf4"
    checkpointing: bool = False
    model: str = str(MODEL)
    rank: int = 16
    alpha: int = 32
    max_tokens: int = 512
    rate: float = 2e-4
    clip: float = 1.0
    device: str = "cpu"
    target_modules: str = "attention"
    most_gib: float | None = None  # of a GPU's memory that the process may take
    train: dict[str, Any] = field(default_factory=dict)  # more of lora's recipe; null takes a setting out
    peer: dict[str, Any] = field(default_factory=dict)  # more of the peers' trainer

    @staticmethod
    def read(folder: Path) -> Work:
        return Work(**json.loads((folder / "work.json").read_text()))


def prepare_work(work: Work, folder: Path) -> None:
    """Write rows.jsonl, tokens.json and work.json. The order of the rows is the one that lora draws."""
    from transformers import AutoTokenizer

    from lora_cli.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = ROWS[work.rows](work.steps * work.rows_per_step, tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_of(work, folder, "order")
    data = prepare(recipe, tokenizer)
    order = data.order(recipe)
    indices = [index for step in range(1, work.steps + 1) for batch in order.step(step) for index in batch]
    assert sorted(indices) == list(range(len(rows))), "every row comes once"
    examples = [data.train[index] for index in indices]
    tokens = [{"ids": [int(id) for id in e.ids], "prompt": len(e.ids) - e.targets, "row": e.row} for e in examples]
    assert [each.spans[0][0] for each in examples] == [each["prompt"] for each in tokens], "completions end their rows"
    (folder / "tokens.json").write_text(json.dumps(tokens))
    (folder / "work.json").write_text(json.dumps(asdict(work)))


def steps_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of each step, as in tokens.json."""
    tokens, size = json.loads((folder / "tokens.json").read_text()), Work.read(folder).rows_per_step
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def recipe_of(work: Work, folder: Path, name: str) -> Any:
    from lora_cli.recipe import Recipe

    train = {
        "micro_batch_size": work.rows_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": work.steps,
        "learning_rate": work.rate,
        "schedule": "constant",
        "warmup_ratio": 0,
        "max_grad_norm": work.clip,
    }
    train |= ({"gradient_checkpointing": CHECKPOINTED} if work.checkpointing else {}) | work.train
    values = {
        "base_model": work.model,
        "quantization": work.quantization,
        "dtype": work.dtype,
        "device": work.device,
        "adapter": {"rank": work.rank, "alpha": work.alpha, "target_modules": work.target_modules},
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": work.max_tokens, "packing": False},
        "train": {name: value for name, value in train.items() if value is not None},
        "output": str(folder / name),
    }
    return Recipe.model_validate(values)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


def functions() -> Iterator[tuple[str, str, str]]:
    """(kind, name, source) of the functions of the standard library and of the methods of its classes."""
    seen = set()
    for module in MODULES.split():
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            if str(getattr(thing, "__module__", "")).split(".")[0].lstrip("_") != module:
                continue
            parts = [("function", f"{module}.{name}", thing)]
            if inspect.isclass(thing):
                parts = [("method", f"{module}.{name}.{part}", each) for part, each in sorted(vars(thing).items())]
            for kind, full_name, each in parts:
                try:
                    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(each, "__func__", each)))).strip()
                except (TypeError, OSError):  # written in C, or generated
                    continue
                if source.startswith(("def ", "async def ", "@")) and source not in seen:
                    seen.add(source)
                    yield kind, full_name, source


def questions(tokenizer: Any, shortest: int, longest: int) -> list[tuple[int, dict[str, str]]]:
    """(tokens, row) of every function whose row has that many tokens."""
    found = []
    for kind, name, source in functions():
        row = {"prompt": f"Write the {kind} {name} of Python's standard library.\n", "completion": source}
        tokens = len(tokenizer(row["prompt"] + source)["input_ids"]) + 1
        if shortest <= tokens <= longest:
            found.append((tokens, row))
    return found


def long_questions(count: int, tokenizer: Any) -> list[dict[str, str]]:
    """Rows of 64 to 500 tokens, drawn by the square of their length: the mean is about 270 tokens instead of 160."""
    rng = random.Random(0)
    keyed = [(rng.expovariate(tokens**2), row) for tokens, row in questions(tokenizer, 64, 500)]
    drawn = [row for _, row in sorted(keyed, key=lambda each: each[0])[:count]]  # Efraimidis & Spirakis 2006
    rng.shuffle(drawn)
    return enough(drawn, count)


def short_questions(count: int, tokenizer: Any) -> list[dict[str, str]]:
    """Rows of 32 to 128 tokens."""
    rows = [row for _, row in questions(tokenizer, 32, 128)]
    random.Random(0).shuffle(rows)
    return enough(rows[:count], count)


def dense_questions(count: int, tokenizer: Any, tokens: int = 512) -> list[dict[str, str]]:
    """Rows of exactly 512 tokens: functions one after the other, cut where the row is full."""
    found = list(functions())
    random.Random(0).shuffle(found)
    rows: list[dict[str, str]] = []
    while found and len(rows) < count:
        _, name, text = found.pop()
        prompt = f"Write functions of Python's standard library, beginning with {name}.\n"
        while found and len(tokenizer(prompt + text)["input_ids"]) < tokens:
            text += "\n\n\n" + found.pop()[2]
        ids = tokenizer(prompt + text)["input_ids"][: tokens - 1]  # the end token is the last one
        row = {"prompt": prompt, "completion": tokenizer.decode(ids).removeprefix(prompt)}
        if tokenizer(prompt + row["completion"])["input_ids"] == ids:
            rows.append(row)
    return enough(rows, count)


def enough(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    if len(rows) < count:
        raise SystemExit(f"the standard library gives only {len(rows)} such rows, {count} are needed")
    return rows


ROWS: dict[str, Callable[[int, Any], list[dict[str, str]]]] = {
    "long": long_questions,
    "short": short_questions,
    "dense": dense_questions,
}
