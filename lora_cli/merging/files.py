"""A merged folder beside its weights: the base's own files byte for byte, and the few that a merge must change.

Other programs read config.json and tokenizer files by rules of their own. Written again by transformers 5 they mean
another model to transformers 4, mlx-lm and llama.cpp (a lost rope_theta, an unknown tokenizer class), without a word.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.adapters.card import CARD, model_card
from lora_cli.base.source import BaseSource, require_inside
from lora_cli.base.weight_files import weight_files
from lora_cli.data.chat.template import chat_template
from lora_cli.ending import remove_leftovers
from lora_cli.errors import LoraError
from lora_cli.merging.tensors import INDEX

# The base's weights in other forms: they would not be those of the merged model.
_OTHER_WEIGHTS = {".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".ot", ".npz", ".mlmodel"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_CODE = {".py", ".pyc", ".so"}
_README, _BASE_README = CARD, "README.base.md"
_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")
"""
_OWN = {_BASE_README, "merge.json"}


def require_place(output: Path) -> Path:
    """The absolute path of a folder to be written. Raises LoraError, before any work, where it could not take place.

    What commands that were killed left beside it goes now, as its room may be needed.
    """
    place = Path(os.path.abspath(output))

    def refuse(what: str) -> LoraError:
        return LoraError(what, where=str(output), fix="choose another --output, a folder that does not exist yet")

    if output.is_symlink() or place.is_symlink():
        raise refuse("the output is a link, which would be replaced and not what it leads to")
    if place.exists():
        if not place.is_dir() or any(place.iterdir()):
            raise refuse("the output already exists")
        if os.path.ismount(place):
            raise refuse("the output is a mount point, and a folder that is written whole cannot take its place")
        if Path.cwd().is_relative_to(place):
            raise refuse("the output is the current folder, which cannot be replaced")
    parent = next(each for each in place.parents if each.exists() or each.is_symlink())
    if not parent.is_dir():
        raise refuse(f"{parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise refuse(f"{parent} cannot be written")
    remove_leftovers(place)
    return place


def require_outside(place: Path, folder: Path, whose: str = "base model") -> None:
    """Raises LoraError for an output inside this folder, which would be part of it from then on."""
    if place.resolve().is_relative_to(folder.resolve()):
        what = f"the output is inside the {whose}'s folder"
        raise LoraError(what, where=str(place), fix="choose another --output beside it")


def require_outside_adapter(place: Path, adapter: Path) -> None:
    """The same for an adapter's folder, and for the run that it belongs to."""
    run = adapter.resolve().parent
    if all((run / name).is_file() for name in ("recipe.yaml", "environment.json")):
        require_outside(place, run, "run")
    require_outside(place, adapter, "adapter")


def base_files(base: Path, *, code: bool) -> tuple[list[Path], list[str]]:
    """The files that go along with the weights, relative to the base's folder, and what is left out, in words.

    code: whether Python files are among them. Raises LoraError for a link that leads out of the folder.
    """
    weights = {file.resolve() for file in (*weight_files(base), base / INDEX)}
    taken: list[Path] = []
    left: dict[str, list[str]] = {}
    for path in _walk(base):
        name = path.relative_to(base)
        if path.resolve() in weights:
            continue
        if (reason := _why_left_out(name, code)) is not None:
            left.setdefault(reason, []).append(name.as_posix())
        else:
            require_inside(path, base)
            taken.append(name)
    return taken, [f"{_some(names)} left out: {reason}" for reason, names in left.items()]


def _why_left_out(name: Path, code: bool) -> str | None:
    suffix = name.suffix.lower()
    if _PICKLES & {each.lower() for each in name.suffixes}:
        return "pickled files can run code, and hold the base's weights if any"
    if suffix in _OTHER_WEIGHTS or name.name.endswith(".index.json"):
        return "the base's weights in another form, without the adapter"
    return "code of the base is copied only with --trust-remote-code" if suffix in _CODE and not code else None


def _walk(base: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(base):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in inner:
            if (Path(folder) / name).is_symlink():
                require_inside(Path(folder) / name, base)
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))


def copy_files(base: Path, names: Sequence[Path], place: Path) -> None:
    for name in names:
        if name.as_posix() in _OWN and (base / _README).exists():  # the base was merged by this program
            continue
        target = place / (_BASE_README if name == Path(_README) else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, target)


def write_config(base: Path, place: Path, *, dtype: str | None, dequantized: bool) -> None:
    """config.json with another dtype (in transformers' words) or without its quantization, or else as it is."""
    path = base / "config.json"
    if dtype is None and not dequantized:
        shutil.copyfile(path, place / "config.json")
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    _edit(config, dtype, dequantized)
    if dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = dtype  # known to every version
    _write_json(place / "config.json", config)


def _edit(config: dict[str, Any], dtype: str | None, dequantized: bool) -> None:
    if dequantized:
        config.pop("quantization_config", None)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and dtype is not None and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):  # the configuration of a part, such as text_config
            _edit(value, dtype, dequantized)


def trained_stops(tokenizer: Any, prompting: str | None) -> list[int]:
    """The token that training taught to end an answer with: the chat template's, or the tokenizer's end token.

    prompting: as the adapter records it; without a record the template counts where there is one.
    """
    if prompting == "raw" or not tokenizer.chat_template:
        return [tokenizer.eos_token_id]
    try:
        token = chat_template(tokenizer, None, "the model").stop_token
    except LoraError:  # a template that cannot be used was not trained with
        return []
    stop = tokenizer.convert_tokens_to_ids(token) if token is not None else None
    return [stop] if stop is not None and stop != tokenizer.unk_token_id else []


def add_stop_tokens(source: BaseSource, place: Path, stops: Sequence[int]) -> list[int]:
    """Let generation end at the tokens that training taught to end at; returns those that the base did not end at."""
    path = source.folder / "generation_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    else:  # transformers then takes these from config.json
        named = {key: source.stated(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = {key: value for key, value in named.items() if value is not None}
    own = settings.get("eos_token_id")
    ends = own if isinstance(own, list) else [] if own is None else [own]
    added = [stop for stop in stops if stop not in ends]
    if added:
        settings.pop("_from_model_config", None)  # transformers 4 may take the ends of config.json over these
        settings["eos_token_id"] = [*ends, *added] if ends or len(added) > 1 else added[0]
        _write_json(place / path.name, settings)
    return added


def write_notes(place: Path, facts: dict[str, Any], base: BaseSource, said: Sequence[str]) -> None:
    """merge.json, and a README that says what this folder is. said: what was measured, a point each."""
    _write_json(place / "merge.json", facts)
    if (place / _BASE_README).exists():
        said = [*said, f"The base model's own page is {_BASE_README}."]
    card = model_card(base, library="transformers", relation="merge", said=said, settings={}, use=_USE)
    (place / _README).write_text(card, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
