"""An example: token ids, and which of them are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Span = tuple[int, int, float]  # first token, one behind the last, weight of their loss


@dataclass(frozen=True)
class Example:
    """Token ids and the spans that are trained, in order and apart.

    file, row, line: where it came from; the line is known while rows are read, and not kept.
    """

    ids: Sequence[int] | np.ndarray  # (tokens,)
    spans: Sequence[Span]
    file: str = ""
    row: int = 0
    line: int | None = None

    @property
    def source(self) -> str:
        return f"{self.file}: row {self.row}"

    @property
    def targets(self) -> int:
        """Target tokens. The first token of an example has nothing before it to be predicted from."""
        return sum(end - max(start, 1) for start, end, _ in self.spans if end > 1)

    @property
    def target_weight(self) -> float:
        """Sum of the weights of the target tokens: their number, where no weight was given."""
        return sum((end - max(start, 1)) * weight for start, end, weight in self.spans if end > 1)

    @property
    def weights(self) -> np.ndarray:
        """Weight of the loss on each token, 0 where it is not trained: (tokens,) float32."""
        weights = np.zeros(len(self.ids), np.float32)
        for start, end, weight in self.spans:
            weights[start:end] = weight
        return weights

    @property
    def trained(self) -> np.ndarray:
        """Whether each token is a target: (tokens,) bool."""
        return self.weights > 0


def cut(example: Example, start: int, end: int, train_from: int = 0) -> Example:
    """Tokens start to end of an example; of them those from train_from on are trained as before."""
    spans = [
        (max(first, start, train_from) - start, min(last, end) - start, weight)
        for first, last, weight in example.spans
        if max(first, start, train_from) < min(last, end)
    ]
    return Example(example.ids[start:end], spans, example.file, example.row, example.line)


def windows(example: Example, length: int, stride: int) -> list[Example]:
    """Windows of `length` tokens, each `stride` further; every token is a target in exactly one window.

    In all but the first, tokens seen before are context. stride = length gives disjoint pieces, each of which starts
    with one token of context so that its first target can be predicted.
    """
    stride = min(stride, length - 1)
    pieces = []
    done = 0  # tokens that have been targets, or were the first
    while done < len(example.ids):
        end = length if done == 0 else min(done + stride, len(example.ids))
        piece = cut(example, max(0, end - length), end, done)
        if piece.targets:
            pieces.append(piece)
        done = end
    return pieces
