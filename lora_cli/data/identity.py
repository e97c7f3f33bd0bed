"""What tells one tokenizer, and one version of this code, from another: prepared data are kept under it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


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
