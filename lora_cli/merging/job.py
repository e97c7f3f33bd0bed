"""One merge on its way: what it reads of adapter and base, what it measures, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.card import measured_of, public_name
from lora_cli.adapters.file import CHAT_TEMPLATE, AdapterFile, read_adapter
from lora_cli.adapters.opened import adapter_folder, adapter_template, open_model, other_base
from lora_cli.adapters.trained import adapters_disabled
from lora_cli.base.device import DTYPES
from lora_cli.base.linear import dense_weight, is_quantized, unquantized_layers
from lora_cli.base.load import load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.stored import parameters_stored, stored_quantization
from lora_cli.base.weight_files import stored_tensors
from lora_cli.data.example import Example
from lora_cli.errors import LoraError
from lora_cli.files import human_bytes, require_space
from lora_cli.merging import files
from lora_cli.merging.compare import (
    commonest_dtype,
    comparison_tokens,
    divergence,
    dtype_of,
    fits_in_fp32,
    logits_of,
    make_dense,
    reopened,
)
from lora_cli.merging.in_place import compute_in_place
from lora_cli.merging.names import Places
from lora_cli.merging.onto import better_base, held_out, losses_of
from lora_cli.merging.quantized import Rounding, rounding_lines, rows_to_measure
from lora_cli.merging.report import NOISE, MergeReport, require_number
from lora_cli.merging.streamed import (
    Skeleton,
    changed,
    fresh_from_files,
    require_own_head,
    skeleton_from_files,
    why_whole,
)
from lora_cli.merging.tensors import Fresh, write_weights


@dataclass(frozen=True)
class Before:
    """Base + adapter on the comparison's tokens, (1, tokens).

    trained: logits on the weights of training, (tokens, vocabulary). reference: on those merged onto, the same tensor
    where these are one. facts: what else was measured, as MergeReport names it.
    """

    tokens: Tensor
    trained: Tensor
    reference: Tensor
    facts: dict[str, Any]

    def compared_with(self, merged: Tensor) -> dict[str, Any]:
        """MergeReport's figures. merged: the merged model's logits."""
        return self.facts | {
            "kl": divergence(self.reference, merged),
            "top1_agreement": (self.reference.argmax(-1) == merged.argmax(-1)).float().mean().item(),
            "largest_difference": (self.reference - merged).abs().max().item(),
            "kl_trained": None if self.reference is self.trained else divergence(self.trained, merged),
        }


class Merge:
    """What was read of adapter and base before any weight is."""

    def __init__(
        self, path: Path, base: str | None, dtype: str, onto: str, code: bool, proof: str, say: Any, kind: str | None
    ):
        self.folder, self.say, self.code, self.proof = adapter_folder(path), say, code, proof
        self.load = partial(open_model, base, path, device="cpu", trust_remote_code=code)
        self.adapter: AdapterFile = read_adapter(self.folder)
        self.notes: list[str] = []
        self.quantized: set[str] = set()  # names of the layers held in 4 or 8 bits, without adapters
        name, revision = (base, None) if base is not None else self.adapter.own_base()
        words = self.adapter.tokenizer_for(name)
        self.source: BaseSource = find_base(name, revision, trust_remote_code=code, tokenizer=words)
        self.stored = stored_tensors(self.source.folder)
        # As the checkpoint itself is; of a GGUF file, as training held it.
        self.held = held = stored_quantization(self.source, self.adapter.metadata.quantization)
        self.quantization = self.adapter.metadata.quantization or held or "none"
        where = self.source.place
        if held is not None and onto == "original":
            what = f"the base is stored in {held}: there are no original weights in it to merge onto"
            raise LoraError(what, where=where, fix="leave out --onto, or name the unquantized model with --base")
        in_groups = self.adapter.metadata.method == "qa_lora"
        if in_groups and onto == "original":
            what = (
                "qa_lora is merged into the offsets of the int4 base that it was trained on, and into no other weights"
            )
            raise LoraError(what, where=str(self.folder), fix="leave out --onto original")
        if held is not None and self.quantization != held:
            what = f"the adapter was trained on a base held in {self.quantization}, but this one is stored in {held}"
            raise LoraError(what, where=where, fix="name the base model of the training with --base")
        self.onto = "original" if self.quantization == "none" else "trained" if onto == "auto" else onto
        for note in other_base(self.adapter, base):
            self._note(note)
        if in_groups and dtype == "keep":
            dtype = "fp32"  # d · q + m has more digits than bf16
        self.dtype = None if dtype == "keep" else DTYPES[dtype]
        self.dense = self.dtype or dtype_of(self.source, self.stored)
        self.template = adapter_template(self.folder)
        self.taken, left_out = files.base_files(self.source.folder, code=code)
        for note in left_out:
            self._note(note)
        parameters = parameters_stored(self.stored)
        widest = max((each.shape[0] for each in self.stored.values() if len(each.shape) == 2), default=0)  # of logits
        in_16_bits = self.quantization == "none" and kind is None
        self.fp32 = fits_in_fp32(parameters, widest, held_besides=0 if in_16_bits else 1.2)
        kept = self.dense if self.held is not None else commonest_dtype(self.stored)
        self.written_dtype = next((name for name, each in DTYPES.items() if each == (self.dtype or kept)), "fp64")
        self.block_by_block = proof == "full" and not self.fp32  # until it turns out that it cannot be
        self.rounding: Rounding | None = None
        if kind is not None:
            rows = rows_to_measure(kind, proof, self.adapter.metadata.method, path)
            compute = DTYPES.get(self.adapter.metadata.compute_dtype or "", self.dense)
            self.rounding = Rounding(kind, self.source, self.stored, compute, code, rows)
        self._require_room(parameters)

    @property
    def as_trained(self) -> bool:
        """Whether the model is merged onto the weights of training."""
        return self.onto == "trained" or self.quantization == "none"

    @property
    def compared_in(self) -> str:
        return "fp32" if self.fp32 or self.block_by_block else "16 bits"

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def _require_room(self, parameters: int) -> None:
        as_stored = 0 if self.dtype else sum(each.size_bytes for each in self.stored.values())
        largest = max(parameters * self.dense.itemsize, as_stored)
        beside = sum((self.source.folder / name).stat().st_size for name in self.taken)
        self.needed_bytes = largest + beside + 10_000_000
        if self.rounding is not None:
            self.needed_bytes += self.rounding.room(largest, beside, self.dense, self.say)
        if self.proof != "full":
            return
        if parameters > 1e9:
            held = (
                f"about {human_bytes(4 * parameters)} of memory" if self.fp32 else "a block of it in memory at a time"
            )
            self.say(
                f"comparing on the CPU: {held}, and three passes over the comparison's tokens, some minutes each for a "
                "large model"
            )

    def open(self, onto: str) -> Any:
        """Base + adapter on these weights: whole, or block by block from its files where it does not fit in fp32."""
        if self.block_by_block:
            quantization = self.quantization if onto == "trained" else "none"
            why = why_whole(self.adapter, quantization, self.held)
            if why is None and (model := self._in_place(quantization)) is not None:
                return model
            self.block_by_block = False
            smallest = f"{NOISE['16 bits']:g} nats a token"
            self._note(
                "too little memory for fp32, and not every weight can be read from the files by itself: compared in "
                f"16 bits, which cannot see differences below {smallest}"
            )
        return self.open_whole(onto)

    def _in_place(self, quantization: str) -> Any | None:
        found = self._skeleton(quantization)
        compute = self.adapter.metadata.compute_dtype
        return compute_in_place(found, DTYPES[compute] if compute is not None and quantization != "none" else None)

    def open_whole(self, onto: str) -> Any:
        """Base + adapter in memory, in fp32 arithmetic on these weights where memory allows it."""
        self.quantized = set()
        if onto == "original" or self.quantization == "none":
            return self.load(quantization="none", dtype="fp32" if self.fp32 else "auto").model
        model = self.load(quantization=self.quantization, dtype=self.adapter.metadata.compute_dtype or "auto").model
        layers = model.named_modules(remove_duplicate=False)
        self.quantized = {name.removesuffix(".base_layer") for name, layer in layers if is_quantized(layer)}
        self._say_of_other_layers(model)
        if self.fp32:
            make_dense(model)
        return model

    def reopened(self, place: Path) -> Any:
        """The written model, without its adapter."""
        if not self.block_by_block:
            return reopened(place, fp32=self.fp32, trust_remote_code=self.code)
        written = BaseSource(str(place), place)
        held = stored_quantization(written)
        how: Any = {"quantization": held or "none", "held": held, "trust_remote_code": self.code}
        return compute_in_place(skeleton_from_files(written, None, stored_tensors(place), **how), None)

    def to_compare(self, run: Path) -> Sequence[Example]:
        """Held-out examples to compare the trained and the original weights on; none, and said, where it cannot be."""
        if self.quantization == "none":
            return ()
        examples = held_out(run)
        if why := self._why_not_compared(examples):
            self._note(f"merged onto the trained weights; the original ones were not compared: {why}")
            return ()
        tokens = sum(len(each.ids) for each in examples)
        self.say(
            f"comparing the trained and the original weights on {tokens} held-out tokens (--onto trained skips that)"
        )
        return examples

    def compare_before(self, run: Path, examples: Sequence[Example]) -> tuple[Before, Any | None]:
        """Measure base + adapter, and choose the weights to merge onto where there are examples to choose by.

        Also the model on these weights, if it is still in memory.
        """
        model = self.open("trained")
        tokens, origin = comparison_tokens(run, model)
        trained, effect = self.reference(model, tokens)
        reference, facts = trained, {}
        if examples or not self.as_trained:
            losses = losses_of(model, examples, in_place=self.block_by_block) if examples else None
            model = None  # its memory is needed for the original one
            model = self.open("original")
            if losses is not None:
                facts["bases_compared"] = self.choose(model, examples, *losses)
            if self.as_trained:
                model = None
            else:
                reference, effect = self.reference(model, tokens)
        facts |= {"adapter_effect": effect, "tokens": origin, "compared_in": self.compared_in}
        return Before(tokens, trained, reference, facts), model

    def reference(self, model: Any, tokens: Tensor) -> tuple[Tensor, float]:
        """Logits of base + adapter, and how far the adapter moves them: KL to the base alone."""
        found = logits_of(model, tokens)
        with adapters_disabled(model):
            effect = divergence(found, logits_of(model, tokens))
        require_number(effect, self.folder)
        if self.rounding is not None:
            self.rounding.measure_trained(model, self.block_by_block)
        return found, effect

    def logits_of_merged(self, place: Path, tokens: Tensor) -> Tensor:
        model = self.reopened(place)
        if self.rounding is not None:
            self.rounding.measure("merged", model, self.block_by_block)
        return logits_of(model, tokens)

    def choose(self, model: Any, examples: Sequence[Example], trained: Tensor, targets: Tensor) -> dict[str, Any]:
        """Merge onto the original weights if they are surely better than the trained ones; what was measured.

        model: base + adapter on the original ones. trained: losses on the others.
        """
        original, _ = losses_of(model, examples, in_place=self.block_by_block)
        self.onto, sentence, facts = better_base(trained, original, targets)
        self._note(sentence)
        return facts

    def _why_not_compared(self, examples: Sequence[Example]) -> str | None:
        if self.held is not None:
            return "the base is stored quantized"
        if self.adapter.metadata.method == "qa_lora":
            return "a qa_lora update fits no other"
        if self.proof != "full":
            return f"--proof {self.proof} opens no model"
        return None if examples else "there are no prepared validation rows of its run"

    def _say_of_other_layers(self, model: Any) -> None:
        """Some layers cannot be held in 4 bits on a CPU; if they were in training, this is not quite that model."""
        trained = self.adapter.metadata.unquantized_modules
        if trained is None:
            why = "it was made before that was kept"
            self._note(f"the adapter does not say which layers were quantized in training ({why})")
        elif other := sorted(set(unquantized_layers(model)) ^ set(trained)):
            self._note(
                f"{len(other)} layers are quantized in another way on this machine than in training, the first is "
                f"{other[0]}: merge where it was trained to get that model exactly"
            )

    def streamed(self) -> tuple[Any, Places, dict[str, Fresh]] | None:
        """What changes, without the base's weights in memory; None, and said, where the model must be opened for it."""
        onto = "none" if self.onto == "original" else self.quantization
        why, found = why_whole(self.adapter, onto, self.held), None
        if why is None:
            found = fresh_from_files(self._skeleton(onto))
            why = "its weight files hold changed layers in another form than the model" if found is None else None
        if found is None:
            self._note(f"the base model is opened whole, and not read a tensor at a time: {why}")
        else:
            require_own_head(found[0])
        return found

    def _skeleton(self, quantization: str) -> Skeleton:
        how: Any = {"quantization": quantization, "held": self.held, "trust_remote_code": self.code}
        return skeleton_from_files(self.source, self.adapter, self.stored, **how)

    def changes_of(self, model: Any) -> tuple[Any, Places, dict[str, Fresh]]:
        """What changes, of an opened model."""
        require_own_head(model)
        places = Places.of(model, self.stored)
        with torch.no_grad():
            changes = changed(model, self.quantized, lambda layer, _: dense_weight(layer))
            return model, places, places.fresh(changes)

    def write(self, place: Path, shard_bytes: int, _: Any, places: Places, fresh: dict[str, Fresh]) -> list[str]:
        """Everything but merge.json and README.md; returns the stop tokens that were added."""
        require_space(place, self.needed_bytes, "the merged model")
        if unused := places.unused(fresh):
            self._note(
                f"{len(unused)} tensors that the model's class does not use are carried over as they are, the "
                f"first is {unused[0]}"
            )
        write_weights(self.source, place, fresh, dtype=self.dtype, dense=self.dense, shard_bytes=shard_bytes)
        files.copy_files(self.source.folder, self.taken, place)
        named = str(self.dtype).removeprefix("torch.") if self.dtype is not None else None
        files.write_config(self.source.folder, place, dtype=named, dequantized=self.held is not None)
        if self.template is not None:  # the adapter's own, which all programs take before that of any other file
            (place / CHAT_TEMPLATE).write_text(self.template, encoding="utf-8", newline="")
        tokenizer = load_tokenizer(self.source, trust_remote_code=self.code)
        tokenizer.chat_template = self.template or tokenizer.chat_template
        added = files.add_stop_tokens(
            self.source, place, files.trained_stops(tokenizer, self.adapter.metadata.prompting)
        )
        names = [str(tokenizer.convert_ids_to_tokens(each)) for each in added]
        if names:
            self._note(f"generation now also ends at {', '.join(names)}, which the base's settings leave out")
        return names

    def write_notes(self, place: Path, report: MergeReport) -> None:
        base = public_name(self.source)
        facts = report.as_dict() | {"base_model": base, "base_revision": self.source.revision}
        facts |= {"base_fingerprint": self.source.fingerprint, "quantization": self.quantization}
        facts |= self.adapter.metadata.model_dump(include={"prompting", "system", "method"})
        del facts["output"]
        said = [f"Merged by `lora merge`: {report.effect} (how: merge.json)."]
        if report.quantized is not None:
            said += [f"{line[0].upper()}{line[1:]}." for line in rounding_lines(report.quantized)]
        files.write_notes(place, {"format": 1, **facts}, self.source, [*measured_of(self.adapter.folder), *said])
