"""`lora push`: an adapter or a merged folder into a repository of the Hugging Face hub, with its card.

Only files that lora wrote or took from the base are uploaded, and none of them names a folder of this machine.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from lora_cli.adapters.card import CARD
from lora_cli.adapters.file import FILES, TENSORS, read_adapter
from lora_cli.adapters.named import find_named
from lora_cli.base.weight_files import stored_tensors
from lora_cli.errors import LoraError, command, home_expanded, reading, reason_of, refuse_if
from lora_cli.files import human_bytes
from lora_cli.foreign import is_real_file, read_bytes, read_text
from lora_cli.training.runs import list_runs

# Of a merged folder: what lora writes there, and what a base brings along.
_MERGED = """config.json generation_config.json merge.json README.md README.base.md model*.safetensors merges.txt
model.safetensors.index.json tokenizer*.json special_tokens_map.json added_tokens.json vocab.json vocab.txt *.model
*.tiktoken chat_template.* preprocessor_config.json processor_config.json LICENSE* NOTICE* USE_POLICY*"""
_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # keys of a config.json that may hold a folder
_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Upload:
    """What would be in the repository: by name, the file here, or its content where that is changed on the way."""

    repository: str
    private: bool
    files: dict[str, Path | bytes]
    left_out: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}
        return vars(self) | {"files": sizes, "card": self.files[CARD].decode()}  # type: ignore[union-attr]

    def lines(self) -> Iterator[str]:
        """What is uploaded, then the card."""
        said = self.as_dict()
        yield f"{self.repository} ({'private' if self.private else 'public: everybody can read it'})"
        yield from (f"  {human_bytes(size):>10}  {name}" for name, size in said["files"].items())
        if self.left_out:
            yield f"left out, as lora did not write them: {', '.join(self.left_out)}"
        yield from ("", *said["card"].splitlines(), "")


def prepare_upload(
    source: str, to: str, *, base: str | None = None, public: bool = False, code: bool = False
) -> Upload:
    """Find and check what is uploaded; touches no network.

    base: the hub's name of the base, where training used a folder. code: also the Python files of a merged folder.
    Raises LoraError for what is not finished, not whole, or not an adapter or a merged folder.
    """
    for option, given in {"--to": to, "--base": base}.items():
        if given and (wrong := _no_name(given)):
            raise LoraError(f"{option} {given} is not a name of the hub: {wrong}", fix=f"write {option} owner/name")
    named = find_named(source)
    folder = named.adapter or Path(home_expanded(source))
    refuse_if(not folder.is_dir(), "no such folder", where=source, fix="name a run, an adapter or a merged folder")
    if named.run is not None and (run := list_runs(named.run)[0]).state not in ("done", "nothing learned"):
        finish = command("lora", "train", named.run, "--resume")
        raise LoraError(f"this run is not finished: {run.progress}", where=named.run, fix=f"finish it: {finish}")
    if named.adapter is None and not (folder / "merge.json").is_file():
        fix = f"to upload all of its files: {command('hf', 'upload', to, source, '.', '--private')}"
        raise LoraError("this is a model that lora did not merge", where=source, fix=fix)
    wanted = [*FILES] if named.adapter else _MERGED.split() + ["*.py"] * code
    names = sorted(each for each in os.listdir(folder) if not each.startswith("."))
    files = {each: folder / each for each in names if any(fnmatchcase(each, one) for one in wanted)}
    files = {each: path for each, path in files.items() if is_real_file(path)}
    fix = f"write {CARD}: what it is, how it was trained; the adapter/ of a finished run has one"
    refuse_if(CARD not in files, f"this folder has no {CARD}, the page that the hub shows", where=folder, fix=fix)
    was = _whole(folder, named.adapter is not None, base)
    changed = dict(_changed(files, was, base))
    return Upload(to, not public, {**files, **changed}, [each for each in names if each not in files])


def _no_name(name: str) -> str | None:
    """Why this is not a repository's name on the hub."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        return reason_of(error)
    return None if "/" in name else "it has no owner"


def _whole(folder: Path, is_adapter: bool, base: str | None) -> str | None:
    """The base as an adapter names it. Raises LoraError for damaged weights, or a base that is a folder here."""
    if not is_adapter:
        stored_tensors(folder)
        return None
    adapter = read_adapter(folder)
    was, peft = adapter.base_model, adapter.metadata.adapter_format is None
    named = was and peft and not _no_name(was) and not Path(was).exists()
    what = f"the adapter's base is a folder of this machine: {was}" if was else "the adapter names no base"
    fix = "add --base owner/name, the base's name on the hub; if it is not there, push a merged model instead"
    refuse_if(adapter.base_revision is None and not named and base is None, what, where=folder, fix=fix)
    return was


def _changed(files: dict[str, Path], was: str | None, base: str | None) -> Iterator[tuple[str, bytes]]:
    """The card, and every file that names a folder of this machine. was: the base as an adapter names it."""
    text = read_text(files[CARD])
    if base:
        text = text.replace(was, base) if was and "/" in was else text  # PEFT's card names it so, ours as Python does
        text = text.replace(f'"{Path(was or base).name}"', f'"{base}"')
        if "\nbase_model:" not in text:
            text = text.replace("---\n", f"---\nbase_model: {base}\n", 1)
    yield CARD, text.encode()
    for file, path in files.items():
        if file.endswith("config.json"):
            with reading("this file is not readable", path, "copy the folder again"):
                said = dict(json.loads(read_bytes(path)))
            local = {key: Path(said[key]).name for key in _NAMES[1:] if _no_name(str(said.get(key) or "a/b"))}
            new = said | local | ({_NAMES[0]: base} if base and _NAMES[0] in said else {})
            if new != said:
                yield file, (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
    if base and TENSORS in files:
        content = read_bytes(files[TENSORS], files[TENSORS].stat().st_size)
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        said = header.get("__metadata__", {})
        said |= {"base_model": base} if "base_model" in said else {}
        said.pop("tokenizer", None)  # a folder of this machine; the base on the hub has its own
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head = head.ljust(-(-len(head) // 8) * 8)  # tensors begin at a multiple of 8
        yield TENSORS, struct.pack("<Q", len(head)) + head + content[end:]


def send(upload: Upload) -> str:
    """Make the repository if there is none, and commit the files to it, all or none. Returns its address.

    Raises LoraError where the hub says no, cannot be reached, or shows to everybody what was to be private.
    """
    refuse_if(constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set, so nothing can be uploaded", fix="unset HF_HUB_OFFLINE")
    refuse_if(hub.get_token() is None, "there is no token of the hub on this machine", fix=_LOGIN)
    api, to = hub.HfApi(), upload.repository
    with _hub_errors(to):
        address = api.create_repo(to, private=upload.private, exist_ok=True)
        there = api.model_info(to)
        if upload.private and not there.private:
            fix = "add --public, choose another name, or make it private in its settings on the hub"
            raise LoraError("it exists and is public: everybody could read what is pushed there", where=to, fix=fix)
        weights = [each.rfilename for each in there.siblings or () if each.rfilename.endswith(".safetensors")]
        if other := [each for each in weights if each not in upload.files]:
            what = f"it already holds other weights, which would be mixed with these: {other[0]}"
            raise LoraError(what, where=to, fix="choose another name, or delete those files on the hub")
        files = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=it) for name, it in upload.files.items()]
        api.create_commit(to, files, commit_message="Upload with lora")
    return str(address)


@contextmanager
def _hub_errors(to: str) -> Iterator[None]:
    try:
        yield
    except LoraError:
        raise
    except Exception as error:  # httpx's, hf_xet's, and RuntimeError around them
        while error.__cause__ is not None and not getattr(error, "response", None):
            error = error.__cause__  # type: ignore[assignment]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            what, fix = "the hub does not know this token", _LOGIN
        elif status in (403, 404):
            what = "this token may not write to it"
            fix = "`hf auth whoami` shows whose it is: choose a name of yours, or a token with the right to write"
        elif status is None:
            what, fix = f"the upload failed: {reason_of(error)}", "check the network, and push again"
        else:
            what, fix = f"the hub refused it: {reason_of(error)}", "try again later; HF_DEBUG=1 shows the requests"
        raise LoraError(what, where=to, fix=fix) from None
