"""A recipe's YAML: its values, and the place of each key in the file."""

from __future__ import annotations

import difflib
import re
import stat
import sys
from pathlib import Path
from typing import Any

import yaml

from lora_cli import limits
from lora_cli.errors import LoraError, command, refuse_if
from lora_cli.files import human_bytes, require_regular

# What PyYAML lets through of a value that looks like a date or is tagged as a number, but is not one
NO_VALUE = (ValueError, LookupError, TypeError, AttributeError)

KeyPath = tuple[str, ...]
_OF_DATA = {".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".xlsx"}


class Places(dict[KeyPath, str]):
    """The place of each key of a recipe, such as "run.yaml:3:5" or "--set train.seed"."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = str(file)

    def of(self, key: KeyPath) -> str:
        """The place of a key; of a missing one, that of its section."""
        inside = (where for known, where in self.items() if known[: len(key)] == key)
        around = (self[key[:end]] for end in range(len(key) - 1, 0, -1) if key[:end] in self)
        return self.get(key) or next(inside, None) or next(around, self.file)


def _place(file: str, mark: yaml.Mark) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """YAML without what a recipe does not need and what makes a small file a large value: aliases and merge keys.

    file: for messages. Raises LoraError where a recipe goes beyond limits.py, before it takes time or memory.
    """

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self._file = file
        self._levels = self._values = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > limits.RECIPE_LEVELS:  # scanning takes longer with each level, before anything is composed
            raise self._refused("this is nested too deeply", _FLAT, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        self._values += 1
        if self._values > limits.RECIPE_VALUES:
            what = f"there are more than {limits.RECIPE_VALUES:,} keys and values"
            raise self._refused(what, "check the path; a recipe is a page of YAML", event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            what = f"a recipe has no aliases (*{str(event.anchor)[:40]})"
            raise self._refused(what, "write out the value itself", event.start_mark)
        if self._levels > limits.RECIPE_LEVELS:
            raise self._refused("this is nested too deeply", _FLAT, event.start_mark)
        self._levels += 1
        node: Any = super().compose_node(parent, index)
        self._levels -= 1
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:merge":
                raise self._refused("a recipe has no merge keys (<<)", "write the keys out", node.start_mark)
            if node.tag != "tag:yaml.org,2002:str" and len(node.value) > limits.RECIPE_DIGITS:
                raise self._refused("this number is too long", "put it in quotes if it is text", node.start_mark)
        return node

    def _refused(self, what: str, fix: str, mark: Any) -> LoraError:
        return LoraError(what, where=_place(self._file, mark), fix=fix)


_FLAT = "a recipe has sections and keys in them, no deeper levels"


def parse_value(text: str, where: str) -> Any:
    """The value that a line of YAML means, as on the right of --set. Raises LoraError, YAMLError or NO_VALUE."""
    loader = _Loader(text, where)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_recipe_yaml(path: Path, text: str | None = None) -> tuple[dict[str, Any], Places, list[LoraError]]:
    """Values, places of keys, and keys that are set twice. Raises LoraError for what cannot be read at all.

    text: what to read in place of the file.
    """
    text, places = _text_of(path) if text is None else text, Places(path)
    try:
        loader = _Loader(text, places.file)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            what = "the recipe is empty" if node is None else "a recipe is a mapping of keys to values"
            raise LoraError(what, where=path, fix="start from a recipe that comes with lora: lora init --list")
        twice = _locate(node, (), places)
        values = loader.construct_document(node)
        if not isinstance(values, dict):  # by a tag, such as !!set
            raise LoraError(f"a recipe is a mapping, not {node.tag}", where=path, fix="remove the tag")
        return values, places, twice
    except yaml.MarkedYAMLError as error:
        where = _place(places.file, error.problem_mark) if error.problem_mark else path
        what, fix = error.problem, "check indentation, colons and quotes"
    except yaml.reader.ReaderError as error:
        where = f"{path}:{text[: error.position].count(chr(10)) + 1}"
        what, fix = f"character {error.character:#06x} is not allowed", "remove it"
    except NO_VALUE as error:
        what, where, fix = error, path, "put the value in quotes"
    raise LoraError(f"not valid YAML: {what}", where=where, fix=fix)


def _text_of(path: Path) -> str:
    """Raises LoraError for what cannot be a recipe by its kind or size, before reading: a device has no end."""
    try:
        entry = path.stat()
        refuse_if(stat.S_ISDIR(entry.st_mode), "this is a folder, not a recipe", where=path, fix="name the YAML file")
        fix = f"name a recipe; {command('lora', 'init', 'MODEL', path)} writes one for these data"
        refuse_if(path.suffix.lower() in _OF_DATA, "this is data, not a recipe", where=path, fix=fix)
        require_regular(path)  # besides, paths in a recipe start at its folder, which a pipe does not have
        if entry.st_size > limits.RECIPE_BYTES:
            what = f"{human_bytes(entry.st_size)} are too much for a recipe"
            raise LoraError(what, where=path, fix="check the path; a recipe is a page of YAML")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoraError("no such recipe", where=path, fix=_nearby_file(path)) from None
    except OSError as error:
        raise LoraError(f"cannot be read: {error.strerror}", where=path, fix="check path and permissions") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LoraError("not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8") from None


def _nearby_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path(".")
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "check the path; lora init --list shows recipes that come with lora"


def _locate(node: yaml.MappingNode, at: KeyPath, places: Places) -> list[LoraError]:
    """Fills `places`, of list items too; returns an error for every key that is set twice."""
    twice: list[LoraError] = []
    for key_node, value_node in node.value:
        where = _place(places.file, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise LoraError("a key must be a plain word", where=where, fix="write it as key: value")
        if key_node.tag != "tag:yaml.org,2002:merge":
            key_node.tag = "tag:yaml.org,2002:str"  # a key is its text, also where YAML reads a number, yes or null
        key = (*at, key_node.value)
        if key in places:
            fix = f"remove one; the other is at {places[key]}"
            twice.append(LoraError(f"the key {'.'.join(key)} is set twice", where=where, fix=fix))
        places.setdefault(key, where)
        items = enumerate(value_node.value) if isinstance(value_node, yaml.SequenceNode) else ()
        for inner, value in ((key, value_node), *(((*key, str(number)), item) for number, item in items)):
            places.setdefault(inner, _place(places.file, value.start_mark))
            if isinstance(value, yaml.MappingNode):
                twice += _locate(value, inner, places)
    return twice


def place_of(problem: LoraError) -> tuple[int, int]:
    """To sort by line and column; then comes what concerns the whole file, then the command line."""
    found = re.search(r":(\d+)(?::(\d+))?$", problem.where or "")
    return (int(found[1]), int(found[2] or 0)) if found else (sys.maxsize, "--set" in str(problem))
