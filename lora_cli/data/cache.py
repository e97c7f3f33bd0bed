"""Where prepared data is kept: under which key, what of that folder is ours, whether it was made here, clearing up."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.store import PARTS, stamps
from lora_cli.errors import LoraError
from lora_cli.files import free_name
from lora_cli.foreign import NotOurs, Shape, kind, not_ours, parse_json, read_bytes, remove_ours
from lora_cli.recipe import Recipe

FILES: Shape = dict.fromkeys((*PARTS, "summary.json"))
_KEY = re.compile(r"[0-9a-f]{20}")
_HALF_DONE = re.compile(r"\.+[0-9a-f]{20}\.(?:building|damaged)-(\d+)(?:[.-].*)?", re.DOTALL)


def cache_folder(recipe: Recipe) -> Path:
    return Path(recipe.data.cache) if recipe.data.cache is not None else Path(recipe.output) / "prepared"


def require_no_link(place: Path, own: bool) -> None:
    """Raises NotOurs if a folder of prepared data is a link. own: whether the cache is that of the run folder."""
    if own and kind(place.parent) == "link":
        what = "this is a link, and links are not followed inside a run folder"
        raise NotOurs(what, where=str(place.parent), fix="remove it, and name the other folder with data.cache")
    if kind(place) == "link":
        raise not_ours(place, "link", "folder")


def made_here(folder: Path) -> bool:
    """Whether prepared data were written where they are. If not they came from elsewhere, and may hold anything."""
    stated = _stored(folder).get("stamps")
    with suppress(OSError):
        return stamps(folder) == stated
    return False


def remove_old(cache: Path, newest: Path) -> None:
    """Remove all prepared data but the newest. What lora did not write stays, and nothing is said of it."""
    for old in cache.iterdir():
        ours = _KEY.fullmatch(old.name) and kind(old) == "folder" and _stored(old).keys() >= {"summary", "checksums"}
        if ours and old != newest:
            with suppress(OSError):
                remove_ours(old, FILES)


def _stored(folder: Path) -> dict[str, Any]:
    """What summary.json says; nothing where it is missing, damaged or not a file that lora wrote."""
    with suppress(OSError, ValueError, LoraError):
        stored = parse_json(read_bytes(folder / "summary.json"))
        return stored if isinstance(stored, dict) else {}
    return {}


def remove_damaged(place: Path) -> None:
    """In one move, so that nobody finds it half removed; another run may be doing the same.

    Raises NotOurs if it holds what lora did not write.
    """
    aside = free_name(place.with_name(f".{place.name}.damaged-{os.getpid()}"))
    try:
        place.rename(aside)
    except FileNotFoundError:
        return
    if kind(aside) == "file":
        aside.unlink()
    elif not remove_ours(aside, FILES):
        aside.rename(place)
        what = "this folder is for prepared data, and holds what lora did not write"
        raise NotOurs(what, where=str(place), fix="move what it holds elsewhere, or name another folder as data.cache")


def forget_killed(cache: Path) -> None:
    """Remove what processes that have ended left half-done."""
    for folder in cache.glob(".*"):
        left = _HALF_DONE.fullmatch(folder.name)
        process = int(left[1]) if left else None
        alive = process is None or Path(f"/proc/{process}").exists() or not Path("/proc").exists()
        if not alive or process == os.getpid():  # an earlier process had this number
            with suppress(OSError):
                remove_ours(folder, FILES)


# ── what the key depends on ───────────────────────────────────────────────────────────────────────────────────────────


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend: Any = tokenizer.backend_tokenizer
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(json.dumps([tokenizer.special_tokens_map, str(tokenizer.chat_template)], default=str).encode())
    return digest.hexdigest()


def code_hash() -> str:
    """Of everything in this room, so that no change of it is forgotten, and of the libraries that make tokens."""
    digest = hashlib.sha256("/".join(version(name) for name in ("tokenizers", "transformers", "jinja2")).encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
