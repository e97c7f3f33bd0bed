"""Every causal-LM type that the installed transformers knows, tiny and random: it trains, or is refused in words.

`python tests/test_sweep.py` writes the table of docs/models.md.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, quiet_console, save_tiny
from tiny_types import TYPES, tiny_config

from lora_cli.adapters.attach import attach, leave_out
from lora_cli.adapters.reach import unreached
from lora_cli.adapters.targets import find_targets
from lora_cli.adapters.trained import dropout_keys, trained_parameters
from lora_cli.base.load import load_model
from lora_cli.base.recompute import save_only_inputs
from lora_cli.base.source import find_base
from lora_cli.base.trials import ordinary_tokens, require_causal, require_no_leak
from lora_cli.data.batches import MicroBatch, collate
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.evaluation.loss import summed_loss

CPU = torch.device("cpu")
# One of each kind of architecture, through `lora check` and `lora train` whole: what they end as.
SOME = {
    "llama": "packs",
    "gpt2": "packs",
    "mixtral": "packs",  # experts
    "deepseek_v3": "packs",  # latent attention
    "gemma3": "packs",  # composite, with windows
    "gemma4": "packs",  # composite, heads of several widths
    "qwen3_5": "pads",  # hybrid, composite configuration
    "granitemoehybrid": "pads",  # Mamba with a gated norm, and experts
    "nemotron_h": "pads",
    "mamba2": "pads",  # no attention at all
    "falcon": "pads",  # ALiBi or its own mask
    "bert": "refused",  # an encoder
}
TABLE, NOTE = ROOT / "docs" / "models.md", "<!-- below: written by tests/test_sweep.py -->"


@dataclass(frozen=True)
class Outcome:
    """ends: packs, pads, refused, or not built. why: in words, but for those that pack."""

    kind: str
    ends: str
    why: str = ""


def outcome(kind: str, folder: Path, tokenizer: Any) -> Outcome:
    """What training comes to, by its parts in their order: adapters, trials, loss, gradients. Raises as they do."""
    try:
        save_tiny(tiny_config(kind), folder, tokenizer=tokenizer)
    except Exception as error:  # the types that cannot be made from their own defaults here; listed in the docs
        return Outcome(kind, "not built", type(error).__name__)
    try:
        model = load_model(find_base(str(folder)), quantization="none", dtype=torch.float32, device=CPU)
        layers = attach(model, find_targets(model, "all-linear", rank=1, alpha=1))
        save_only_inputs(model)
        ids = ordinary_tokens(model, 48, 0).numpy()
        lay_out = partial(collate, pad_id=0, device=CPU, dropout=(0, 0))
        padded = lay_out([Example(ids, [(1, 48, 1.0)])], packed=False)
        layers = leave_out(model, unreached(model, layers, partial(backward, model, layers, padded)))
        require_causal(model, CPU)
        require_no_leak(model, CPU)
        ends, why = "packs", ""
    except LoraError as error:
        if error.fix != "write data.packing: false":
            return Outcome(kind, "refused", error.what)
        ends, why = "pads", error.what
    examples = [Example(ids[:20], [(5, 20, 1.0)]), Example(ids[20:], [(1, 28, 1.0)])]
    batch = lay_out(examples, packed=ends == "packs")
    backward(model.train(), layers, batch)
    rows = [
        parameter for name, parameter in model.named_parameters() if name.endswith("lora_B") and "expert" not in name
    ]
    assert layers
    assert len(trained_parameters(model)) == 2 * len(layers)
    silent = [row for row in rows if row.grad is None or not row.grad.any()]
    assert not silent, f"{kind}: {len(silent)} of {len(rows)} adapters get no gradient"
    assert all(torch.isfinite(row.grad).all() for row in rows if row.grad is not None)
    return Outcome(kind, ends, why)


def backward(model: Any, layers: Any, batch: MicroBatch) -> None:
    with dropout_keys(layers, batch.dropout_keys):
        summed_loss(model, batch).backward()


def swept(place: Path, tokenizer: Any) -> Iterator[Outcome]:
    for kind in TYPES:
        folder = place / kind
        try:
            yield outcome(kind, folder, tokenizer)
        except Exception as error:
            yield Outcome(kind, "crash", f"{type(error).__name__}: {error}")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of 180 architectures
def test_every_type_trains_or_is_refused_in_words(tmp_path: Path, tokenizer: Any):
    found = list(swept(tmp_path, tokenizer))
    crashed = [f"{each.kind}: {each.why}" for each in found if each.ends == "crash"]
    assert not crashed, "\n".join(crashed)
    count = Counter(each.ends for each in found)
    assert count["packs"] + count["pads"] + count["refused"] >= 158
    assert count["packs"] > count["pads"] > count["refused"]
    if f"transformers {version()}:" in TABLE.read_text(encoding="utf-8"):
        assert TABLE.read_text(encoding="utf-8").split(NOTE)[1].strip() == table(found).strip()


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.filterwarnings("ignore")
def test_one_of_each_kind_through_check_and_train(kind, tmp_path: Path, recipe_file: Any, tokenizer: Any):
    from lora_cli.planning.check import check
    from lora_cli.recipe import load_recipe
    from lora_cli.training.train import train

    folder = save_tiny(tiny_config(kind), tmp_path / kind, tokenizer=tokenizer)
    settings = {"base_model": str(folder), "adapter": {"rank": 1, "target_modules": "all-linear"}}
    settings["train"] = {"max_steps": 2, "learning_rate": 1e-3}
    ends = "refused"
    for name, packing in (("packs", True), ("pads", False)):
        recipe = load_recipe(recipe_file(**settings, data={"packing": packing}))
        checked, trained = said_or(partial(check, recipe)), said_or(partial(train, recipe, quiet_console()))
        if isinstance(trained, str):
            assert checked == trained, "check refuses what training refuses, in the same words"
            continue
        assert trained["trained_parameters"] == checked.parameters
        ends = name
        break
    assert ends == SOME[kind]


def said_or(call: Any) -> Any:
    """What a call gives, or what it was refused with."""
    try:
        return call()
    except LoraError as error:
        return f"{error.what} ({error.fix})"


def version() -> str:
    import transformers

    return transformers.__version__


def table(found: list[Outcome]) -> str:
    """Markdown: how many end as what, and which."""
    meaning = {
        "packs": "examples lie side by side on one row, without padding",
        "pads": "trained with `data.packing: false`: examples would see each other on one row",
        "refused": "refused before training, with the reason",
        "not built": "not tried: no tiny model can be made from the defaults of this type here",
    }
    lines = [f"Of the {len(found)} types of transformers {version()}:", ""]
    lines += ["| ends as | types | which |", "|---|---|---|"]
    for ends, what in meaning.items():
        kinds = [each.kind for each in found if each.ends == ends]
        lines.append(f"| {ends}: {what} | {len(kinds)} | {', '.join(kinds)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    import tempfile

    from tiny_model import make_tokenizer

    with tempfile.TemporaryDirectory() as place:
        outcomes = list(swept(Path(place), make_tokenizer()))
    for each in outcomes:
        print(each, file=sys.stderr)
    before = TABLE.read_text(encoding="utf-8").split(NOTE)[0]
    TABLE.write_text(f"{before}{NOTE}\n\n{table(outcomes)}", encoding="utf-8")
