"""Finding a base model: a local folder, or a hub repository brought to one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.base.bounds import read_object, require_modest_config
from lora_cli.base.gguf import GgufFile, is_gguf, open_gguf
from lora_cli.base.weight_files import fingerprint, stored_tensors, weight_files
from lora_cli.errors import LoraError, command
from lora_cli.files import disk_errors, require_regular

# Configuration, tokenizer and safetensors; no pickles, no copies in other formats. Code comes only when it may run.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_WANTED += ["LICENSE*", "NOTICE*", "README.md"]  # which a merged folder keeps
_ADAPTER = "adapter_config.json"
_FOLDER = "name the folder that holds config.json and the weights"
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "*.bin", "*.pth", "*.gguf"]


@dataclass(frozen=True)
class BaseSource:
    """Where a base model is. name: as the user wrote it. revision: the exact commit if it came from a hub.

    gguf: where it is a GGUF file; the folder then is one of this process, without weights. tokenizer: the folder of
    another tokenizer than the file's.
    """

    name: str
    folder: Path
    revision: str | None = None
    gguf: GgufFile | None = None
    tokenizer: str | None = None

    @property
    def place(self) -> Path:
        """Where a person finds it."""
        return Path(self.name) if self.gguf is not None else self.folder

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should hear before it is used."""
        return self.gguf.notes if self.gguf is not None else ()

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_object(self.folder / "config.json")

    def stated(self, *keys: str) -> Any:
        """The first of these settings that config.json has; a composite one may have it for its text alone."""
        text = self.config.get("text_config")
        parts = (self.config, text if isinstance(text, dict) else {})
        return next((part[key] for part in parts for key in keys if part.get(key) is not None), None)


def find_base(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, tokenizer: str | None = None
) -> BaseSource:
    """The folder of a base model; a hub id is downloaded once into the Hugging Face cache. tokenizer: of a GGUF file.

    Raises LoraError when there is no such model, no network, no access, or nothing in it that can be loaded.
    """
    folder = Path(name)
    require_regular(folder)
    of_gguf = folder.is_file() and is_gguf(folder)
    if not of_gguf:
        _require_model_folder(name, folder)
        if tokenizer is not None:
            fix = "remove tokenizer"
            raise LoraError(f"tokenizer is for a GGUF file, but {name} has one in its folder", fix=fix)
    if revision is not None and (of_gguf or folder.is_dir()):
        what = f"revision {revision} is for hub models, but {name} is a local {'file' if of_gguf else 'folder'}"
        raise LoraError(what, fix="remove revision")
    if of_gguf:
        found = open_gguf(folder, tokenizer)
        return BaseSource(name, found.folder, gguf=found, tokenizer=tokenizer)
    if folder.is_dir():
        source = BaseSource(name, folder.resolve())
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        fix = "check the path, or use a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        raise LoraError("no such model folder", where=name, fix=fix)
    else:
        source = _download(name, revision, trust_remote_code)
    _check_folder(source)
    return source


def _require_model_folder(name: str, path: Path) -> None:
    """Raises LoraError for what people name instead of a model folder: an adapter, a run, one of its files."""
    if name.lower().endswith(".gguf") and not path.exists():
        raise LoraError(f"no such GGUF file: {name}", fix="check the path; files of the hub are downloaded first")
    if path.is_file():
        fix = f"name its folder: {path.parent}" if (path.parent / "config.json").is_file() else _FOLDER
        raise LoraError(f"{name} is a file, not a model folder", fix=fix)
    if not path.is_dir() or (path / "config.json").exists():
        return
    adapter = path if (path / _ADAPTER).is_file() else path / "adapter"
    if (adapter / _ADAPTER).is_file():
        kind = "an adapter" if adapter == path else "a run folder, whose result is an adapter"
        base = read_object(adapter / _ADAPTER).get("base_model_name_or_path")
        named = f"name its base model: {base}" if isinstance(base, str) and base else "name its base model"
        merging = command("lora", "merge", name, "--output", "FOLDER")
        merged = f"merge it first: {merging}, and name that folder"
        raise LoraError(f"{name} is {kind}, not a base model", fix=f"{named}; or {merged}")
    if files := sorted(path.glob("*.gguf")):
        raise LoraError(f"{name} holds GGUF files, one of which is a model", fix=f"name the file, such as {files[0]}")


def _check_folder(source: BaseSource) -> None:
    config = source.folder / "config.json"
    if not config.is_file():
        raise LoraError("the model folder has no config.json", where=str(source.folder), fix=_FOLDER)
    for file in source.folder.iterdir():
        require_regular(file)
    for file in weight_files(source.folder):
        require_inside(file, source.folder)
    require_modest_config(read_object(config), config, stored_tensors(source.folder))
    generation = source.folder / "generation_config.json"
    ends = read_object(generation).get("eos_token_id") if generation.is_file() else None
    several = ends if isinstance(ends, list) else [0 if ends is None else ends]
    if not all(type(end) is int and 0 <= end < 2**31 for end in several):
        raise LoraError("eos_token_id is not a token's number", where=str(generation), fix="download the file again")


def _download(name: str, revision: str | None, trust_remote_code: bool) -> BaseSource:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        with disk_errors(Path(constants.HF_HUB_CACHE)):
            path = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
    # HTTPError: that of httpx or httpx2, by the version of huggingface_hub
    except (hub.HFValidationError, hub.HTTPError, OSError) as error:
        cause = error.__cause__ or error  # "not in the cache" hides why there was no answer
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(error, hub.HFValidationError):
            what, fix = f"{name} is neither a folder here nor a hub id", "write owner/name, or a path to a model folder"
        elif isinstance(error, hub.GatedRepoError):
            what = f"{name} is gated: its owner wants you to accept terms first"
            fix = f"accept them on the model's page, then run `hf auth login` or set HF_TOKEN ({name})"
        elif isinstance(error, hub.RevisionNotFoundError):
            what, fix = f"{name} has no revision {revision}", "check base model and revision"
        elif isinstance(error, hub.RepositoryNotFoundError) or status in (401, 403):  # unauthorized, forbidden
            what = f"the hub has no model {name} that you may read"
            fix = "check the spelling; for a private model run `hf auth login` or set HF_TOKEN; or name a folder"
        else:
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            what = f"{name} is not in the local cache and cannot be downloaded: {reason}"
            fix = "connect to the network and try again (what has arrived is kept), or give the path of a model folder"
        raise LoraError(what, fix=fix) from None
    folder = Path(path)
    return BaseSource(name, folder, revision=folder.name)


def require_inside(path: Path, folder: Path) -> None:
    """Raises LoraError for a link that leads out of a model or adapter folder, the hub's cache aside.

    What such a folder holds is copied into folders that are published; a stranger's must not name a private file.
    """
    target = path.resolve()
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not target.is_relative_to(folder.resolve()) and not in_hub_cache:
        what = f"{path.relative_to(folder)} is a link that leads out of this folder, to {target}"
        copying = command("cp", "-rL", folder, f"{folder}-copy")
        raise LoraError(what, where=str(folder), fix=f"if its links are yours: {copying}, and name the copy")
    if not path.exists():
        raise LoraError(f"{path.relative_to(folder)} is a broken link", where=str(folder), fix="remove it")
