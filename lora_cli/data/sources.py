"""Reading rows from data files, through `datasets`, with errors that name file and row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Row:
    """One row of a data file. number: counted from 1, in the file's order."""

    file: str
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}: row {self.number}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a data file; a .txt file is one row, `text`.

    Nothing is written: `datasets` streams the file instead of filling a cache.
    Raises LoraError for a file that is missing, empty, of an unknown kind, not UTF-8, or broken (with the line).
    """
    if not path.is_file():
        raise LoraError(
            "no such data file" if not path.exists() else "this is a folder, not a data file",
            where=str(path),
            fix=_nearby(path),
        )
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise LoraError(
            f"unknown kind of data file {path.suffix or '(no ending)'}",
            where=str(path),
            fix=f"use {', '.join(BUILDERS)}",
        )
    if path.stat().st_size == 0:
        raise LoraError("the data file is empty", where=str(path), fix="check what wrote it")
    if builder != "parquet":
        _require_utf8(path)
    rows = [Row(str(path), number, values) for number, values in enumerate(_stream(path, builder), 1)]
    if not rows:
        raise LoraError("the data file has no rows", where=str(path), fix="check what wrote it")
    return rows


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stream(path: Path, builder: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        for row in load_dataset(builder, data_files=str(path), split="train", streaming=True, **options):
            yield dict(row)
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        raise _explain(path, builder, error) from None


def _explain(path: Path, builder: str, error: Exception) -> LoraError:
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as broken:
                return LoraError(f"broken JSON: {broken}", where=f"{path}:{number}", fix="mend or remove this line")
            if not isinstance(row, dict):
                return LoraError(
                    f"a row must be a JSON object, this is {line[:40]}",
                    where=f"{path}:{number}",
                    fix='write {"column": …}',
                )
    if path.suffix.lower() == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as broken:
            return LoraError(
                f"broken JSON: {broken.msg}", where=f"{path}:{broken.lineno}:{broken.colno}", fix="mend the file"
            )
    reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
    return LoraError(
        f"cannot be read as {builder}: {reason}",
        where=str(path),
        fix="every row needs the same columns, each with one type",
    )


def _require_utf8(path: Path) -> None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise LoraError(
                    f"not UTF-8 text: byte {line[error.start]:#04x}",
                    where=f"{path}:{number}",
                    fix="convert it, for example with iconv -t UTF-8",
                ) from None


def _nearby(path: Path) -> str:
    import difflib

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "check the path; relative paths start at the recipe's folder"
