"""Inputs of recomputed blocks in host memory: copied out behind the forward pass, fetched ahead of the backward pass.

On a GPU both copies are on a stream of their own, beside the computing one. What makes that right:

1. A copy begins after all that the computing stream had been given by then: its source is made, and nobody reads or
   writes its target any more.
2. The computing stream waits for a copy before the device's tensor is used or let go (`_Input`). All memory of the
   device is allocated on the computing stream, so whoever gets it next comes after that wait. `record_stream` would do
   as well but for the memory: the host is blocks ahead, finds no event done yet, and allocates anew for each block.
3. Pinned memory is handed out again when torch has seen the last copy done that it took part in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Wait = Callable[[], None]
Copy = Callable[[Tensor, Tensor], Wait]


def pinned_bytes(size: int) -> int:
    """What torch takes of host memory for a pinned tensor of that many bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def copier(device: torch.device) -> Copy:
    """begin(into, source) begins a copy; what it returns makes the computing stream wait for its end. On a CPU a plain
    copy.
    """
    if device.type != "cuda":
        return lambda into, source: (into.copy_(source), lambda: None)[1]
    beside = torch.cuda.Stream(device)

    def begin(into: Tensor, source: Tensor) -> Wait:
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            into.copy_(source, non_blocking=True)
        done = beside.record_event()
        return lambda: torch.cuda.current_stream(device).wait_event(done)

    return begin


class HostInputs:
    """What autograd saves within `saved()` goes to host memory.

    Of a forward pass only the newest tensor is on the device as well, and of its backward pass the one that comes next.
    """

    def __init__(self, copies: Callable[[torch.device], Copy] = copier):
        self.copies = cache(copies)
        self.newest: weakref.ref[_Input] | None = None

    def saved(self) -> AbstractContextManager[None]:
        return saved_tensors_hooks(self._keep, self._give)

    def _keep(self, tensor: Tensor) -> _Input:
        if before := self.newest and self.newest():
            before.let_go()
        kept = _Input(tensor, before, self.copies(tensor.device))
        self.newest = weakref.ref(kept)
        return kept

    def _give(self, kept: _Input) -> Tensor:
        self.newest = None  # the next forward pass begins anew
        return kept.fetched()


class _Input:
    """A tensor in host memory and, while `here` is not None, on the device, where the last copy may not be done yet."""

    here: Tensor | None = None

    def __init__(self, tensor: Tensor, before: _Input | None, begin: Copy):
        self.before = before and weakref.ref(before)
        self.begin, self.device = begin, tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        self._copying(self.host, tensor.detach(), here=tensor.detach())

    def let_go(self) -> None:
        """Leave it on the host alone."""
        _ = self._taken()

    def fetch(self) -> None:
        """Begin to bring it back, if it is not on the device."""
        if self.here is None:
            here = torch.empty_like(self.host, device=self.device)
            self._copying(here, self.host, here=here)

    def fetched(self) -> Tensor:
        """The tensor on the device, to be used from now on; the one saved before it is under way."""
        self.fetch()
        here = self._taken()
        assert here is not None
        if before := self.before and self.before():
            before.fetch()
        return here

    def _copying(self, into: Tensor, source: Tensor, *, here: Tensor) -> None:
        self.wait = self.begin(into, source)
        self.here, self.version = here, here._version

    def _taken(self) -> Tensor | None:
        here, self.here = self.here, None
        if here is not None:
            self.wait()
            if here._version != self.version:
                raise RuntimeError("a transformer block changed its input in place, so it cannot be recomputed")
        return here

    def __del__(self) -> None:
        if self.here is not None:  # the pass was given up, as where memory ran out
            self.wait()
