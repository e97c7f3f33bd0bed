"""The model card: README.md of an adapter folder and of a merged folder.

It holds no path, row, host name or time: it is uploaded with the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_cli.base.source import BaseSource
from lora_cli.errors import LoraError
from lora_cli.foreign import read_text

CARD = "README.md"
MEASURED = "## What was measured"
USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"), "this-folder")
"""  # of an adapter folder
_MOST = 2**16  # bytes of a card that is read back


def public_name(base: BaseSource) -> str:
    """Its hub id; of a folder its last part alone."""
    return base.name if base.revision is not None else base.folder.name


def model_card(
    base: BaseSource,
    *,
    library: str,
    relation: str,
    said: Sequence[str],
    settings: Mapping[str, object],
    use: str,
    made: str = "trained",
) -> str:
    """The page. relation: `adapter` or `merge`, in the hub's words. said: what was measured, a point each.

    settings: of the training, a row each. use: Python that opens the folder. made: what `lora` did.
    """
    on_hub = [f"base_model: {base.name}", f"base_model_relation: {relation}"] if base.revision is not None else []
    head = ["---", *on_hub, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [lora]", "---"]
    kind = "A LoRA adapter for" if relation == "adapter" else "A LoRA adapter, merged into the weights of"
    revision = f" (revision {base.revision})" if base.revision else ""
    licence = "The licence of the base model holds for what is made of it; say here which it is."
    lines = [*head, "", f"{kind} {public_name(base)}{revision}, {made} by `lora`. {licence}", "", MEASURED, ""]
    lines += [f"- {point}" for point in said]
    if settings:
        rows = [f"| {name} | {value} |" for name, value in settings.items()]
        lines += ["", "## How it was trained", "", "| setting | value |", "|---|---|", *rows]
    return "\n".join([*lines, "", "## Use", "", "```python", use.strip(), "```", ""])


def measured_of(folder: Path) -> list[str]:
    """The points of an adapter folder's own card; none if it has no card that lora wrote."""
    try:
        text = read_text(folder / CARD, at_most=_MOST)
    except (OSError, LoraError):
        return []
    found = re.search(rf"^{MEASURED}\n\n((?:- .+\n)+)", text, re.MULTILINE)
    return [line.removeprefix("- ") for line in found[1].splitlines()] if found else []
