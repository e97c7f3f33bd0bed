"""What lies among the data and is not data: the folders of runs, whose files would be read as rows in the next run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_cli.errors import LoraError


def outside_runs(paths: Iterable[Path], top: Path, written: Sequence[Path]) -> Iterator[Path]:
    """The paths that are not in a run folder below `top`, nor in one of `written`, which the run itself writes."""
    real_top = Path(os.path.realpath(top))
    below = {real for each in written if real_top in (real := Path(os.path.realpath(each))).parents}
    left_out: dict[Path, bool] = {}
    for path in paths:
        folder = path.parent
        if folder not in left_out:
            left_out[folder] = _is_of_a_run(folder, top, below)
        if not left_out[folder]:
            yield path


def _is_of_a_run(folder: Path, top: Path, written: set[Path]) -> bool:
    between = [each for each in (folder, *folder.parents) if top in each.parents]
    if any(all((each / name).exists() for name in ("recipe.yaml", "environment.json")) for each in between):
        return True
    real = Path(os.path.realpath(folder))
    return not written.isdisjoint((real, *real.parents))


def require_text(path: Path) -> None:
    """Raises LoraError for a name that nothing can write down: the run's files say which data it was trained on."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise LoraError("the name of this file is not text in UTF-8", where=str(path), fix="rename it") from None
