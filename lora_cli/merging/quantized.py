"""A merged model in 4 bits: its 16-bit folder, rounded a tensor at a time, and what that costs on held-out rows.

Rounding a merged weight can lose most of what was learned: an update is small beside the steps of 4 bits. So such a
folder is written with its loss beside that of the 16-bit one, or not at all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers.quantizers import AutoHfQuantizer

from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.linear import features, is_linear, stored_transposed
from lora_cli.base.load import model_config, skeleton_of
from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import storage_named, storage_of
from lora_cli.base.tensor_files import NAMES, Entry, put_bytes, read_tensor
from lora_cli.base.weight_files import StoredTensor, stored_tensors, weight_files
from lora_cli.data.example import Example
from lora_cli.errors import command, refuse_if
from lora_cli.evaluation.gain import paired_gain, share_kept
from lora_cli.files import human_bytes, write_json
from lora_cli.merging.names import Places
from lora_cli.merging.onto import held_out, losses_of
from lora_cli.merging.tensors import INDEX, as_stored, replay_entries, write_files
from lora_cli.quantization import RULES, named

_MOST_OF_IT = 0.9


def rows_to_measure(kind: str, proof: str, method: str | None, source: Path) -> list[Example]:
    """Held-out examples of a run. Raises LoraError for what is not written so, or could not be measured."""
    rules = RULES.get(kind)
    fix = f"write {named(lambda each: each.written)}"
    refuse_if(rules is None or not rules.written, f"a merge cannot be rounded to {kind}", fix=fix)
    what = "a qa_lora model is in 4 bits already, and rounding it again would lose what it learned"
    fix = f"write those bits: {command('lora', 'export', source, '--to', 'gguf', '--type', 'q4_1')} --output FILE.gguf"
    refuse_if(method == "qa_lora", what, where=source, fix=fix)
    what = f"--quantize {kind} is written with its measured loss alone, and --proof {proof} measures nothing"
    refuse_if(proof != "full", what, fix="leave out --proof, or --quantize")
    fix = "install it (pip install bitsandbytes), or leave out --quantize"
    refuse_if(find_spec("bitsandbytes") is None, "bitsandbytes is not installed", fix=fix)
    examples = held_out(source)
    what = f"--quantize {kind} is written with its loss on held-out rows alone, and none are prepared here"
    fix = (
        "name the folder of a run that was trained with data.validation; or leave out --quantize, and let the program "
        "that serves the merged model round it"
    )
    refuse_if(not examples, what, where=source, fix=fix)
    return examples


class Rounding:
    """The rounding of one merge: which layers, and the losses of all models on its way.

    layers: stored weights that are rounded, and whether the checkpoint has them as (in, out). settings: what
    config.json says of it. weights: how many numbers are rounded, and all of the model.
    """

    def __init__(
        self,
        kind: str,
        base: BaseSource,
        stored: Collection[str],
        compute: torch.dtype,
        code: bool,
        rows: list[Example],
    ):
        """compute: dtype of the products. rows: what everything is measured on. Raises LoraError for a model whose
        linear layers transformers could not open rounded."""
        self.kind, self.storage, self.rows = kind, storage_named(kind), rows
        self.settings = self.storage.load_settings(compute, double=True)
        self.losses: dict[str, Tensor] = {}
        config = model_config(base, code)
        model = skeleton_of(base, config, code)
        own = {parameter: name for name, parameter in Places.of(model, stored).direct.items()}
        linear = {name: each for name, each in model.named_modules(remove_duplicate=False) if is_linear(each)}
        left_out = linear.keys() - self._rounded_by_transformers(skeleton_of(base, config, code))  # such as the head
        left_out |= {name for name, each in linear.items() if not self.storage.same_on(features(each)[0], "cpu")}
        self.settings.llm_int8_skip_modules = sorted(left_out)
        found = self._rounded_by_transformers(skeleton_of(base, config, code))  # its patterns may take more names
        uses = Counter(map(id, linear.values()))
        lost = sorted(name for name in found if f"{name}.weight" not in own or uses[id(linear[name])] > 1)
        what = f"{len(lost)} linear layers have no stored tensor of their own, the first is {min(lost, default='')}"
        refuse_if(bool(lost), what, where=base.place, fix="leave out --quantize")
        what = f"no linear layer of this model can be rounded to {kind}"
        refuse_if(not found, what, where=base.place, fix="leave out --quantize")
        self.layers = {own[f"{name}.weight"]: stored_transposed(linear[name]) for name in sorted(found)}
        rounded = sum(math.prod(features(linear[name])) for name in found)
        self.weights = rounded, sum(each.numel() for each in model.parameters())

    def _rounded_by_transformers(self, model: Any) -> set[str]:
        """The layers of a skeleton that loading a folder with these settings would take as rounded."""
        AutoHfQuantizer.from_config(self.settings, pre_quantized=True).preprocess_model(model, device_map=None)
        return {name for name, layer in model.named_modules() if storage_of(layer) is self.storage}

    def room(self, plain: int, beside: int, dtype: torch.dtype, say: Callable[[str], None]) -> int:
        """Bytes on disk of the rounded model, about. plain: of the merged one, whose weights are of this dtype.

        beside: of their other files.
        """
        rounded = self.weights[0] * self.storage.bits(dtype.itemsize, double=True) / 8
        made = round(plain - self.weights[0] * dtype.itemsize + rounded)
        say(
            f"on the way the disk holds {human_bytes(plain + made + beside)}, the merged model and the rounded one, of "
            f"which {human_bytes(made + beside)} stay; four losses are measured on {len(self.rows)} held-out rows"
        )
        return made

    def measure(self, name: str, model: Any, in_place: bool) -> None:
        """Losses of a model. in_place: as of `losses_of`."""
        self.losses[name], self.targets = losses_of(model, self.rows, in_place=in_place)

    def measure_trained(self, model: Any, in_place: bool) -> None:
        """Of base + adapter, and of the base alone on the same weights."""
        self.measure("adapter", model, in_place)
        with adapters_disabled(model):
            self.measure("base", model, in_place)

    def finish(
        self,
        plain: Path,
        place: Path,
        dtype: torch.dtype,
        shard_bytes: int,
        reopened: Callable[[], Any],
        in_place: bool,
    ) -> dict[str, Any]:
        """`write`, measure what was written, as `reopened` gives it, and say everything: `facts`."""
        self.write(plain, place, dtype, shard_bytes)
        self.measure("quantized", reopened(), in_place)
        return self.facts(sum(each.size_bytes for each in stored_tensors(place).values()))

    def write(self, plain: Path, place: Path, dtype: torch.dtype, shard_bytes: int) -> None:
        """Move everything of the folder `plain` into `place`, its layers rounded; made twice and compared bit by bit.

        dtype: of weights as they are rounded, which is that of a model that is rounded while it is loaded.
        """
        stored = stored_tensors(plain)

        @lru_cache(maxsize=1)  # the parts of one weight are written one after the other
        def packed(name: str) -> dict[str, Tensor]:
            weight = read_tensor(stored[name])
            return self.storage.packed((weight.T if self.layers[name] else weight).to(dtype).contiguous())

        def entries(name: str, own: StoredTensor) -> Iterator[Entry]:
            if name not in self.layers:
                yield as_stored(name, own)
                return
            for part, each in self.storage.packed_as(torch.Size(own.shape).numel()).items():
                write = partial(_write, packed, name, part)
                yield Entry(name + part, NAMES[each.dtype], tuple(each.shape), each.nbytes, write)

        groups = {name: list(entries(name, own)) for name, own in stored.items()}
        write_files(plain, place, groups, shard_bytes)
        replay_entries(place, (each for group in groups.values() for each in group))
        config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
        for path in weight_files(plain):
            path.unlink()
        (plain / INDEX).unlink(missing_ok=True)
        for path in [*plain.iterdir()]:
            path.rename(place / path.name)
        plain.rmdir()
        write_json(place / "config.json", config | {"quantization_config": self.settings.to_dict()})

    def facts(self, written_bytes: int) -> dict[str, Any]:
        """What was written, and the losses: nats per target token. cost: of rounding, with its 95 % interval. kept:
        the share of base + adapter's gain over the base, with its interval; None where that gain is not sure."""
        losses, targets = self.losses, self.targets
        cost = paired_gain(losses["quantized"], losses["merged"], targets)
        learned = paired_gain(losses["base"], losses["adapter"], targets)
        sure = learned.low is not None and learned.low > 0
        kept = share_kept(losses["base"], losses["adapter"], losses["quantized"]) if sure else (None, None, None)
        rounded, weights = self.weights
        return {
            "kind": self.kind,
            "layers": len(self.layers),
            "weights": rounded,
            "weights_of_model": weights,
            "bytes": written_bytes,
            "losses": {name: (each.sum() / targets.sum()).item() for name, each in losses.items()},
            "cost": {"gain": cost.gain, "low": cost.low, "high": cost.high},
            "learned": {"gain": learned.gain, "low": learned.low, "high": learned.high},
            "kept": dict(zip(("share", "low", "high"), kept, strict=True)),
            "examples": cost.examples,
            "targets": cost.targets,
        }


def _write(packed: Callable[[str], dict[str, Tensor]], name: str, part: str, out: BinaryIO) -> None:
    put_bytes(packed(name)[part], out)


def rounding_lines(facts: dict[str, Any]) -> list[str]:
    """For a person; see `Rounding.facts`."""
    kind, losses, cost, kept = facts["kind"], facts["losses"], facts["cost"], facts["kept"]
    which = f"{facts['examples']} rows, {facts['targets']:,} target tokens"
    half = "" if cost["low"] is None else f" ± {(cost['high'] - cost['low']) / 2:.4f}"
    share = facts["weights"] / facts["weights_of_model"]
    if kept["share"] is None:
        said = (
            "these rows do not show for sure that base + adapter are better than the base: no share of it can be said"
        )
    else:
        interval = f"95 % interval {kept['low']:.0%} to {kept['high']:.0%}"
        said = f"{kind} keeps {kept['share']:.0%} of what was learned ({interval})"
        if kept["share"] < _MOST_OF_IT:
            said += ". Base and adapter used together keep all of it, and so does a merge without --quantize"
    return [
        f"{facts['layers']} layers, {share:.0%} of the weights, are rounded to {kind}: {human_bytes(facts['bytes'])}",
        f"held-out loss on {which}: base {losses['base']:.4f}, base + adapter {losses['adapter']:.4f}, merged "
        f"{losses['merged']:.4f}, in {kind} {losses['quantized']:.4f} (rounding costs {cost['gain']:.4f}{half})",
        said,
    ]
