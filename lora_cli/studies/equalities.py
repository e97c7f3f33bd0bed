"""What must be equal, computed both ways: E1 to E15 of docs/design.md, and how far apart it is.

Apart: the largest difference of an element, as a share of the largest element expected; 0 is bit for bit. Where whole
things are compared (tokens, rows), it is how many differ. Tests call these functions for many models and settings,
`lora selftest` on the machine of a user.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.adapters.attach import attach
from lora_cli.adapters.file import TENSORS, attach_adapter, read_adapter, save_adapter
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.opened import open_model
from lora_cli.adapters.targets import block_lists, find_targets
from lora_cli.adapters.trained import trained_modules, trained_parameters
from lora_cli.base.activations import ActivationPlan
from lora_cli.base.device import pick_device
from lora_cli.base.linear import dense_weight, plain_layer
from lora_cli.base.load import load_model, load_tokenizer
from lora_cli.base.source import BaseSource, find_base
from lora_cli.base.storage.int4 import dequantize, q4_1_blocks
from lora_cli.base.storage.registry import storage_of
from lora_cli.base.trials import ordinary_tokens
from lora_cli.data.batches import MicroBatch, collate
from lora_cli.data.example import Example
from lora_cli.data.feed import open_feed
from lora_cli.data.prepare import prepare
from lora_cli.ending import signalled
from lora_cli.errors import CheckFailed, Interrupted, LoraError
from lora_cli.evaluation.loss import logit_rule, summed_loss
from lora_cli.evaluation.perplexity import example_losses
from lora_cli.planning.check import check
from lora_cli.recipe import Recipe
from lora_cli.screen import Screen
from lora_cli.training.opening import open_session
from lora_cli.training.train import train

ROWS = [
    {"prompt": f"What is {a} plus {b}?{' Think.' * (a % 3)}\n", "completion": f"{a} plus {b} is {a + b}."}
    for a, b in [(i % 7, (3 * i) % 11) for i in range(24)]
]
TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Five,\n\nsince\tnoon."},
]


def apart(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Of the tensors that differ most; infinite where shapes differ or one holds NaN."""
    worst = 0.0
    for pair in zip(actual, expected, strict=True):
        one, right = (each.detach().cpu().double() for each in pair)
        if one.shape != right.shape:
            return math.inf
        difference = (one - right).abs().max().item() / (right.abs().max().item() or 1.0)
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Give every A and B random values: with B at zero nothing of an adapter is proved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in trained_modules(model).values():
            for parameters in layer.parameters_by_group().values():
                for each in parameters:
                    each.copy_(torch.randn(each.shape, generator=generator) * scale)


def adapted(model: Any, target_modules: Any = "attention", *, scale: float = 0.1, **settings: Any) -> Any:
    """The model with a random adapter, of rank 4 and alpha 8 unless `settings` of find_targets say otherwise."""
    attach(model, find_targets(model, target_modules, **({"rank": 4, "alpha": 8.0} | settings)))
    randomize(model, scale=scale)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = ordinary_tokens(model, 32, 0).view(2, 16).to(model.get_input_embeddings().weight.device)
    return model(input_ids=ids, use_cache=False).logits


def outputs(layer: Any, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Of a layer, with the gradients of x and the parameters for a random gradient of the output."""
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), upstream)]


def formula(layer: LoRALinear, x: Tensor) -> float:
    """E2: the layer = x (W + alpha / rank · B A)ᵀ + b, forward and gradients."""
    weight, bias = dense_weight(layer.base_layer).to(x.dtype), layer.bias
    A, B = layer.lora_A, layer.lora_B

    def right(x: Tensor) -> Tensor:
        y = x @ (weight + layer.alpha / layer.rank * B @ A).T
        return y if bias is None else y + bias.to(x.dtype)

    return apart(outputs(layer, x, A, B), outputs(right, x, A, B))


def peft_layer(layer: LoRALinear, base: nn.Module) -> Any:
    """PEFT's layer around `base` with the A and B of this one."""
    import peft

    model: Any = nn.Module()
    model.layer = base
    held = getattr(storage_of(base), "name", None)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = held == "nf4", held == "int8"
    config = peft.LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["layer"], lora_dropout=0.0)  # type: ignore[arg-type]
    injected: Any = peft.inject_adapter_in_model(config, model)
    theirs = injected.layer.train(layer.training)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return theirs


def like_peft(layer: LoRALinear, theirs: Any, x: Tensor) -> float:
    """E2: the layer = PEFT's, forward and gradients."""
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    return apart(outputs(layer, x, layer.lora_A, layer.lora_B), outputs(theirs, x, A, B))


def like_dense(layer: LoRALinear, x: Tensor) -> float:
    """E11: a layer on a quantized base = the same on a dense one with its dequantized weight."""
    dense = copy.deepcopy(layer)
    dense.base_layer = plain_layer(layer.base_layer, x.dtype)
    return apart(outputs(layer, x, layer.lora_A, layer.lora_B), outputs(dense, x, dense.lora_A, dense.lora_B))


def like_gguf(q: Tensor, d: Tensor, m: Tensor) -> float:
    """E12: the weight of an int4 layer = what GGUF reads in its Q4_1 blocks."""
    import gguf

    read = gguf.quants.dequantize(q4_1_blocks(q, d, m).numpy(), gguf.GGMLQuantizationType.Q4_1)
    return apart([torch.from_numpy(read)], [dequantize(q, d, m)])


def fresh(model: Any) -> float:
    """E1: a model with a fresh adapter on every linear layer = without."""
    before = logits(model)
    attach(model, find_targets(model, "all-linear", rank=1, alpha=4.0))
    return apart([logits(model)], [before])


def examples(*lengths: int, vocabulary: int = 512) -> list[Example]:
    """Random tokens; the first third of each is a prompt, as are some tokens in the middle."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        Example(torch.randint(3, vocabulary, (length,), generator=generator).tolist(), spans)
        for length in lengths
        for spans in [[(at, at + 1, 1.0) for at in range(length // 3, length) if at % 5 != 4]]
    ]


def loss_and_gradients(model: Any, batches: Iterable[MicroBatch]) -> list[Tensor]:
    """Summed over the micro-batches: the loss, and all gradients in one vector; they are then forgotten.

    One vector, because small gradients are sums of large terms, whose rounding is as large as they are.
    """
    losses = []
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
    parameters = trained_parameters(model)
    gradients = torch.cat([each.grad.flatten() for each in parameters if each.grad is not None])
    model.zero_grad()
    return [torch.stack(losses).sum(), gradients]


def side_by_side(model: Any, rows: Sequence[Example]) -> float:
    """E3: examples on one row = one at a time, loss and gradients."""
    lay_out = partial(collate, pad_id=0, device=model.device)
    packed = loss_and_gradients(model, [lay_out(rows, packed=True)])
    return apart(packed, loss_and_gradients(model, [lay_out([row], packed=False) for row in rows]))


def recomputed(model: Any, batch: MicroBatch) -> float:
    """E5: blocks that are computed again in the backward pass = blocks that are kept."""
    logit_rule(model)  # tries the model once
    kept = loss_and_gradients(model, [batch])
    blocks = [block for outer in block_lists(model) for block in model.get_submodule(outer)]
    ActivationPlan((True,) * len(blocks), (1.0,) * len(blocks), 1.0).apply(blocks)
    return apart(loss_and_gradients(model, [batch]), kept)


def loss(model: Any, reference: Any, rows: Sequence[Example]) -> float:
    """E5: the loss from chunks of the targets' logits = transformers' own, from all logits."""
    own, theirs = [], []
    for row in rows:
        ids = torch.tensor([list(row.ids)], dtype=torch.int64, device=model.device)
        labels = torch.where(torch.from_numpy(row.trained).to(ids.device), ids, -100)
        with torch.no_grad():
            theirs.append(reference(input_ids=ids, labels=labels).loss * row.targets)
            own.append(summed_loss(model, collate([row], packed=False, pad_id=0, device=model.device)))
    return apart([torch.stack(own)], [torch.stack(theirs).to(model.device)])


def laid_out(model: Any, rows: Sequence[Example]) -> float:
    """E6: the loss of each example = the one that it has alone, however rows are batched, ordered and packed."""
    ways = [(False, 1, 1), (False, 10_000, 1), (False, 100, -1), (True, 64, 1), (True, 10_000, -1)]
    found = []
    for packed, most_tokens, order in ways:
        lay_out = partial(collate, packed=packed, pad_id=0, device=model.device)
        own = example_losses(model, list(rows)[::order], lay_out, most_tokens)[0]
        found.append(own if order > 0 else own.flip(0))
    return max(apart([each], found[:1]) for each in found)


def by_transformers(folder: Path, device: torch.device | None = None) -> Any:
    """A model as transformers alone opens it, in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().to(device or "cpu")


def merged(output: Path, adapter: Path) -> float:
    """E8: a folder that an adapter was merged into, opened by transformers alone = base + adapter."""
    opened = open_model(None, adapter, dtype="fp32")
    return apart([logits(by_transformers(output, opened.device))], [logits(opened.model)])


def opened_by_peft(model: Any, theirs: Any) -> float:
    """E9: what PEFT makes of the saved adapter of `model` = the model."""
    return apart([logits(theirs)], [logits(model)])


def opened_by_us(theirs: Any, folder: Path, model: Any, base: BaseSource) -> float:
    """E9: an adapter that PEFT saves, opened here on `model` = PEFT's model."""
    theirs.save_pretrained(folder, save_embedding_layers=False)  # with the head it would add base weights
    attach_adapter(model, read_adapter(folder), base)
    return apart([logits(model)], [logits(theirs.eval())])


@dataclass
class Bench:
    """A model in a folder, a place for files, and a device; what is measured is opened and trained here."""

    model: str
    place: Path
    device: torch.device = field(default_factory=lambda: pick_device("auto"))
    runs: int = 0  # that were made

    @property
    def source(self) -> BaseSource:
        return find_base(self.model)

    def open(self, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
        return load_model(self.source, quantization=quantization, dtype=dtype, device=self.device)

    def recipe(self, rows: Sequence[dict[str, Any]] = ROWS, **settings: Any) -> Recipe:
        """A small recipe on these rows, with dropout; settings: sections are merged into it."""
        self.runs += 1
        data = self.place / f"rows-{self.runs}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values: dict[str, Any] = {
            "base_model": self.model,
            "quantization": "none",
            "dtype": "fp32",
            "device": self.device.type,
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(data), "max_seq_len": 128},
            "train": {"max_steps": 4, "epochs": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
            | {"learning_rate": 1e-3, "warmup_ratio": 0.0},
            "output": str(self.place / f"run-{self.runs}"),
        }
        for key, value in settings.items():
            values[key] = values[key] | value if isinstance(value, dict) and key in values else value
        return Recipe.model_validate(values)

    def run(self, *, stops: int = 0, **settings: Any) -> Path:
        """The folder of a finished run, which was stopped and resumed that often on its way."""
        recipe = self.recipe(**settings)
        for at in range(stops + 1):
            try:
                with suppress(CheckFailed):  # so few steps need not help on rows that were held out
                    hours = 1e-9 if at < stops else None
                    train(recipe, Screen(stderr=True, quiet=True), max_hours=hours, resume=at > 0)
            except Interrupted:  # after one step; or by a signal, which asks for no checkpoint of what is only measured
                if signalled():
                    raise KeyboardInterrupt from None
        return Path(recipe.output)

    def adapter(self, model: Any, quantization: str = "none") -> Path:
        """A folder with the adapter of this model."""
        self.runs += 1
        folder = self.place / f"adapter-{self.runs}"
        folder.mkdir()
        save_adapter(model, folder, self.source, quantization=quantization, double_quantization=True)
        return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def runs_apart(run: Path, right: Path, *, adapter: str | None = None) -> float:
    """By the losses of their steps; with `adapter`, a folder in the first run, by what was trained too."""
    found = apart([torch.tensor(losses(run))], [torch.tensor(losses(right))])
    if adapter is None:
        return found
    own, other = (load_file(folder / TENSORS) for folder in (run / adapter, right / "adapter"))
    return max(found, apart(own.values(), other.values()))


def split(bench: Bench, **settings: Any) -> float:
    """E4: a run whose steps are one micro-batch, two or eight = the same run."""
    own = settings.pop("train", {})
    ways = [
        bench.run(train={"micro_batch_size": size, "gradient_accumulation_steps": 8 // size} | own, **settings)
        for size in (8, 4, 1)
    ]
    return max(runs_apart(each, ways[0]) for each in ways[1:])


def evaluated(bench: Bench, **settings: Any) -> float:
    """E6: a run that is evaluated after each step = one that never is: losses and adapter."""
    held_out = bench.place / "held.jsonl"
    held_out.write_text(json.dumps({"prompt": "What is 2 plus 2?\n", "completion": "4"}) + "\n", encoding="utf-8")
    plain, own = bench.run(**settings), settings.pop("train", {})
    often = bench.run(**settings, data={"validation": str(held_out)}, train=own | {"eval_every": 1})
    return runs_apart(often, plain, adapter="adapter_last")


def resumed(bench: Bench, **settings: Any) -> float:
    """E7: a run that was stopped after two of its steps and resumed = an uninterrupted one: losses and adapter."""
    return runs_apart(bench.run(stops=2, **settings), bench.run(**settings), adapter="adapter")


Trained = list[tuple[list[int], list[int]]]


def trained_rows(batches: Iterable[MicroBatch]) -> Trained:
    """Of every example of micro-batches in which examples share a row: its tokens; what each predicts, -1: nothing."""
    found: Trained = []
    for batch in batches:
        ids = batch.inputs["input_ids"].flatten().tolist()
        aimed = dict(zip(batch.positions.tolist(), batch.targets.tolist(), strict=True))
        for start, end in pairwise(batch.inputs["cu_seq_lens_q"].tolist()):
            found.append((ids[start:end], [aimed.get(at, -1) for at in range(start, end)]))
    return found


def shown_rows(shown: dict[str, Any]) -> Trained:
    """The same of the document that `lora check --json` prints."""
    every = [row["tokens"] for row in shown["rows"]]
    return [
        ([each["id"] for each in row], [each["id"] if each["trained"] else -1 for each in row[1:]] + [-1])
        for row in every
    ]


def shown(bench: Bench) -> float:
    """E10: what `lora check` shows = what the model is given, token for token; how many rows differ."""
    recipe = bench.recipe(train={"epochs": 1, "max_steps": None})
    rows = shown_rows(check(recipe).as_dict(10_000))
    session = open_session(recipe, Screen(stderr=True, quiet=True))
    batches = [each for step in range(1, session.total_steps + 1) for each in session.feed.step(step)]
    given = trained_rows(map(session.collate, batches))
    return float(sum(one != other for one, other in zip(sorted(rows), sorted(given), strict=False))) + abs(
        len(rows) - len(given)
    )


def prompted(bench: Bench) -> float:
    """E15: the tokens before each trained turn = those that transformers makes to prompt it; how many turns differ."""
    recipe = bench.recipe([{"messages": TURNS}])
    theirs: Any = AutoTokenizer.from_pretrained(bench.source.folder)
    if theirs.chat_template is None:
        raise LoraError("the model has no chat template", fix="measure a model that talks")
    tokenizer = load_tokenizer(bench.source)
    (example,) = open_feed(recipe, prepare(recipe, tokenizer, keep=False), tokenizer).first(10)
    made = [
        theirs.apply_chat_template(TURNS[:at], tokenize=False, add_generation_prompt=True)
        for at in range(1, len(TURNS), 2)
    ]
    starts = [start for start, _, _ in example.spans]
    prompts = [theirs(text, add_special_tokens=False)["input_ids"] for text in made]
    wrong = sum(list(example.ids[:start]) != prompt for start, prompt in zip(starts, prompts, strict=False))
    return float(wrong + abs(len(starts) - len(prompts)))
