"""What a model's small files may ask for: a line in config.json or tokenizer.json can mean any time and memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lora_cli import limits
from lora_cli.errors import LoraError
from lora_cli.files import human_bytes
from lora_cli.limits import LimitReached

_AGAIN = "download it again"
# Names of settings for which parts of a model are built, and of those that sound so and are something else
_COUNT = re.compile(r"layer|depth|block|stage|branch|expert|label|head|group|codebook|modules")
_NO_COUNT = re.compile(r"size|dim|_ids?$|position|token|period|interval|factor|scale|step|freq|threshold|length")
_LAYERS = re.compile(r"layer|depth|block|stage|branch|modules")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises LoraError for anything else, and LimitReached for a file too long."""
    size = file.stat().st_size
    if size > limits.MODEL_JSON_BYTES:
        what = f"{human_bytes(size)} are too much for {file.name}; {human_bytes(limits.MODEL_JSON_BYTES)} is the limit"
        raise LimitReached(what, where=str(file), fix=_AGAIN)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            list(_settings(value))  # nested too deeply for us is too deep for those after us
    except (ValueError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, dict):
        raise LoraError(f"{file.name} is not valid JSON", where=str(file), fix=_AGAIN)
    return value


def require_modest_config(config: dict[str, Any], file: Path, tensors: Collection[str] = ()) -> None:
    """Raises LoraError for a configuration that would build far more than the weights are, or load something else.

    tensors: the names in the checkpoint, where they are known; as many layers as they have numbers are believed.
    """
    numbers = (int(number) for name in tensors for number in re.findall(r"\.(\d{1,9})\.", name))
    numbered = min(1 + max(numbers, default=0), len(tensors))
    layers = min(max(limits.MODEL_LAYERS, numbered), limits.MODEL_MOST_LAYERS)
    for key, value, at in _settings(config):
        names_other = key == "transformers_weights" and value is not None
        if names_other or ("implementation" in key and isinstance(value, str) and "/" in value):
            what = f"config.json says {at}: {str(value)[:80]}, which is neither weights nor code of this folder"
            raise LoraError(what, where=str(file), fix=f"remove {at} from config.json")
        if type(value) is not int:
            continue
        most, name = limits.MODEL_NUMBER, key.lower()
        if _COUNT.search(name) and not _NO_COUNT.search(name):
            most = layers if _LAYERS.search(name) and not re.search("head|expert", name) else limits.MODEL_PARTS
        if abs(value) > most:
            shown = f"{value:,}" if abs(value) < 10**18 else "a number of many digits"
            what = f"{file.name} says {at}: {shown}; {most:,} is the limit"
            raise LimitReached(what, where=str(file), fix=f"correct {at}, or download {file.name} again")
    _require_few_experts(config, file)


def _settings(value: Any, key: str = "", at: str = "") -> Iterator[tuple[str, Any, str]]:
    """(name, value, place) of everything in a configuration; an item of a list has the name of the list."""
    inside = value.items() if isinstance(value, dict) else ((key, each) for each in value)
    for name, each in inside:
        place = f"{at}.{name}".strip(".") if isinstance(value, dict) else at
        if isinstance(each, dict | list):
            yield from _settings(each, str(name), place)
        else:
            yield str(name), each, place


def _require_few_experts(config: dict[str, Any], file: Path) -> None:
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        numbers = {key: value for key, value in part.items() if isinstance(value, int) and value > 0}
        layers = max((value for key, value in numbers.items() if re.search(r"n(um_hidden)?_layers?$", key)), default=1)
        experts = max((value for key, value in numbers.items() if "experts" in key), default=1)
        if layers * experts > limits.MODEL_PARTS:
            what = f"config.json says {layers:,} layers of {experts:,} experts; {limits.MODEL_PARTS:,} is the limit"
            raise LimitReached(what, where=str(file), fix="download config.json again")


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────


def require_modest_tokenizer_files(folder: Path) -> None:
    """Before they are read. Raises LimitReached for a tokenizer that is larger than any known."""
    for file in folder.iterdir():
        weights = file.suffix in (".safetensors", ".py")
        if file.is_file() and not weights and re.match(r"tokenizer|vocab|merges|spiece|special|added", file.name):
            size = file.stat().st_size
            if size > limits.TOKENIZER_BYTES:
                what = f"{human_bytes(size)} are too much for {file.name}"
                raise LimitReached(what, where=str(file), fix=_AGAIN)


def require_modest_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises LimitReached for a tokenizer that would make far more of a text than the text is."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=0)
    if highest > limits.TOKEN_IDS:
        token = next(token for token, id in vocabulary.items() if id == highest)
        what = f"the token {token[:40]!r} has the number {highest:,}; {limits.TOKEN_IDS:,} is the limit"
        raise LimitReached(what, where=str(folder), fix="download tokenizer.json again")
    if max(map(len, vocabulary), default=0) > limits.TOKEN_CHARACTERS:
        what = f"a token has more than {limits.TOKEN_CHARACTERS:,} characters"
        raise LimitReached(what, where=str(folder), fix="download tokenizer.json again")
    growth = _growth(_state(backend.normalizer)) * _growth(_state(backend.pre_tokenizer))
    if growth > limits.TOKENIZER_GROWTH:
        what = f"the tokenizer may make a text {growth:,.0f} times as long; {limits.TOKENIZER_GROWTH} is the limit"
        raise LimitReached(what, where=str(folder), fix="download tokenizer.json again, and look at its normalizer")


def require_own_tokens(tokenizer: Any, ids: Collection[int], folder: Path) -> None:
    """Of a short text: raises LoraError where the tokenizer adds tokens that its vocabulary does not have, or many."""
    known = max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if len(ids) > limits.TOKENS_OF_A_SENTENCE or max(ids, default=0) > known:
        what = f"the tokenizer makes {len(ids):,} tokens of a short sentence, with numbers up to {max(ids):,}"
        details = [f"the highest number in its vocabulary is {known:,}"]
        raise LoraError(what, where=str(folder), details=details, fix="download tokenizer.json again")


def _state(part: Any) -> Any:
    try:
        return json.loads(part.__getstate__()) if part is not None else None
    except (TypeError, ValueError, AttributeError):  # a part that is made of Python
        return None


def _growth(part: Any) -> float:
    """How many times as long a text may become by replacements, each on what the ones before have made."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    if part.get("type") == "Replace":
        pattern, content = part.get("pattern"), str(part.get("content", ""))
        text = pattern.get("String") if isinstance(pattern, dict) else pattern
        return max(1.0, len(content) / len(text)) if isinstance(text, str) and text else 1.0 + len(content)
    if part.get("type") == "Prepend":
        return 1.0 + len(str(part.get("prepend", ""))) / 10
    return _growth([each for each in part.values() if isinstance(each, dict | list)])
