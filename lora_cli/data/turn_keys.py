"""Keys of turns: which of them a chat template reads, found by watching it, and which mean something elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.errors import LoraError

if TYPE_CHECKING:
    from lora_cli.data.chat import ChatTemplate

_OURS = ("role", "content", "tool_calls")
_LOOKS = 20  # renderings for a key that no template has read so far: some look only at the last turn, or after a tool
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ABOUT_LOSS = {"loss", "mask", "masked", "train", "trained", "training", "trainable", "learn", "weight", "weights"}


def require_no_other_meaning(given: Mapping[str, Any], called: str, where: str) -> None:
    """Raises LoraError for a key that says elsewhere whether a turn is trained, such as ms-swift's loss: false."""
    for key, value in given.items():
        if not {word.lower() for word in _WORD.findall(key)} & _ABOUT_LOSS:
            continue
        if isinstance(value, str) and value.strip().lower() not in ("true", "false") and not _is_number(value):
            continue  # a text is nobody's mark
        meaning = "train" if isinstance(value, bool) or str(value).strip().lower() in ("true", "false") else "weight"
        by_hand = f"write train: false on the turns that are not to be trained, and remove {key}"
        mapped = f"write data.columns: {{{meaning}: {key}}} if it says which turns are trained; else {by_hand}"
        inverted = isinstance(value, list | dict) or "mask" in key.lower()
        raise LoraError(
            f"{called} has the key {key}, which other programs read as whether a turn is trained; it would be ignored",
            where=where,
            fix=by_hand if inverted else mapped,
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class TurnKeys:
    """Keys of the turns of one source. template: what they are rendered with, where they are."""

    def __init__(self) -> None:
        self.template: ChatTemplate | None = None
        self._unread: Counter[str] = Counter()  # key → how often a rendering did not read it
        self._read: set[str] = set()

    def look(self, turns: list[dict[str, Any]], tools: Any, where: str) -> None:
        """Renders a conversation with keys that are not known to be read, and watches."""
        new = {key for turn in turns if len(turn) > 2 for key in turn} - self._read - {*_OURS}
        if not new or self.template is None or all(self._unread[key] >= _LOOKS for key in new):
            return
        try:
            self.template.render([_Watched(turn, self._read) for turn in turns], where, tools)
        except LoraError:
            return  # the row will be refused
        self._unread.update(new)

    def unread(self) -> list[str]:
        """Keys that the template did not read."""
        return sorted(self._unread.keys() - self._read)


class _Watched(dict[str, Any]):
    """A turn that notes which of its keys are read."""

    def __init__(self, turn: dict[str, Any], read: set[str]):
        super().__init__(turn)
        self._noted = read

    def _all(self) -> None:
        self._noted.update(self)

    def __getitem__(self, key: str) -> Any:
        self._noted.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._noted.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._noted.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._noted.add(key)
            yield key

    def items(self) -> Any:
        self._all()
        return super().items()

    def values(self) -> Any:
        self._all()
        return super().values()

    def __or__(self, other: Any) -> Any:
        return _Watched(dict(super().items()) | other, self._noted)
