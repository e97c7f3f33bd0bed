"""Writes docs/recipe.md, the table of all settings, from the schema.

python scripts/recipe_reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_cli.recipe import AdapterRecipe, DataRecipe, Recipe, SourceRecipe, TrainRecipe, meaning

HEAD = """# The recipe

One YAML file. Made from the schema by `python scripts/recipe_reference.py`; `lora init --schema` prints the same as
JSON Schema for editors. Unknown keys are refused, with the setting meant; names of axolotl, TRL and others are known.
`--set key.path=value` overrides a setting from the command line.

Relative paths start at the recipe's folder (those given with `--set`: at the current one). `~` and environment
variables are expanded in paths; `$$` is a dollar sign. Numbers such as `1e-4` are numbers.
"""


def table(title: str, model: type) -> str:
    lines = [f"\n## {title}\n", "| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        if name in ("adapter", "data", "train") and model is Recipe:
            continue
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        lines.append(f"| `{name}` | {default} | {meaning(field)} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


def reference() -> str:
    sections = [
        ("Top level", Recipe),
        ("adapter", AdapterRecipe),
        ("data", DataRecipe),
        ("A source, in data.train and data.validation", SourceRecipe),
        ("train", TrainRecipe),
    ]
    return HEAD + "".join(table(title, model) for title, model in sections)


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "recipe.md"
    path.write_text(reference(), encoding="utf-8")
    print(path, file=sys.stderr)
