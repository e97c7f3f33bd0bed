"""Writes docs/recipe.md, the table of all settings, from the schema.

python scripts/recipe_reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lora_cli.recipe import AdapterRecipe, DataRecipe, Recipe, SourceRecipe, TrainRecipe, meaning

HEAD = """# The recipe

One YAML file. Made from the schema by `python scripts/recipe_reference.py`; `lora init --schema` prints the same as
JSON Schema for editors. Unknown keys are refused, with the setting meant; names of axolotl, TRL and others are known.
`--set key.path=value` overrides a setting from the command line.

Relative paths start at the recipe's folder (those given with `--set`: at the current one). `~` and environment
variables are expanded in paths; `$$` is a dollar sign. Numbers such as `1e-4` are numbers. Where `null` is a value, it
means that there is none: `--set data.validation=null`.

Trackers, the hub's tokens, offline use, Windows: [surroundings.md](surroundings.md).
"""


def table(title: str, model: type, example: str) -> str:
    lines = [
        f"\n## {title}\n",
        "```yaml",
        example,
        "```\n",
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    schema = model.model_json_schema()  # type: ignore[attr-defined]
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        if name in ("adapter", "data", "train") and model is Recipe:
            continue
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        lines.append(f"| `{name}` | {values(schema['properties'][name])} | {default} | {meaning(field)} |")
    return "\n".join(lines) + "\n"


def values(schema: dict[str, Any]) -> str:
    """What may be written, in words: the words of a choice, ranges of numbers, `null` where nothing is a value."""
    if "anyOf" in schema:
        parts = dict.fromkeys(values(each) for each in schema["anyOf"])
        return ", ".join(parts)
    if "$ref" in schema:
        return "a source"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of: {values(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"name → {values(inner)}" if isinstance(inner, dict) else "name → value"
    if kind in ("integer", "number"):
        bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        said = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema and schema[key] < 1e6]
        return " ".join([{"integer": "whole number", "number": "number"}[kind], *said])
    return {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}.get(str(kind), "text")


def _shown(value: object) -> str:
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


TOP = """base_model: Qwen/Qwen3-8B
quantization: nf4
output: runs/my-run"""
ADAPTER = """adapter: {rank: 16, alpha: 32, target_modules: all-linear}"""
DATA = """data:
  train: data/faq.csv
  columns: {instruction: Question, output: Answer}
  validation: 0.05
  max_seq_len: 1024"""
SOURCE = """data:
  train:
    - data/own.jsonl
    - {path: data/general.parquet, weight: 0.25}
    - {path: data/faq.csv, columns: {instruction: Frage, output: Antwort}}
    - {hub: HuggingFaceH4/no_robots, split: train}"""
TRAIN = """train:
  epochs: 2
  micro_batch_size: 2
  gradient_accumulation_steps: 4
  learning_rate: 2e-4
  eval_every: 50
  sample_every: 250"""


def reference() -> str:
    sections = [
        ("Top level", Recipe, TOP),
        ("adapter", AdapterRecipe, ADAPTER),
        ("data", DataRecipe, DATA),
        ("A source, in data.train and data.validation", SourceRecipe, SOURCE),
        ("train", TrainRecipe, TRAIN),
    ]
    return HEAD + "".join(table(*section) for section in sections)


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "recipe.md"
    path.write_text(reference(), encoding="utf-8")
    print(path, file=sys.stderr)
