"""One base in memory for many runs: loaded once, and put back as it was loaded before each."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from lora_cli.base.load import load_model
from lora_cli.base.source import BaseSource

_CONTAINERS = (dict, OrderedDict, list, set)


class KeptBase:
    """What a run does to a model is to replace modules, forwards, hooks and flags; all of that is undone.

    A base of which a tensor was changed in place, or that is asked for in another form, is loaded anew.
    """

    def __init__(self) -> None:
        self._form: Any = None
        self._model: Any = None
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._versions: list[int] = []

    def load(self, source: BaseSource, **how: Any) -> Any:
        """The base as `load_model` gives it, with nothing left of the run before; that run's model is used up."""
        form = (source.fingerprint, how)
        if form == self._form:
            self._put_back()
        if form != self._form or self._versions != _versions(self._model):
            self._form = self._model = None
            self._objects = []
            gc.collect()
            model = load_model(source, **how)
            changed = (*model.modules(), model.config)
            self._objects = [(each, _copied(vars(each))) for each in changed]
            self._form, self._model, self._versions = form, model, _versions(model)
        return self._model

    def _put_back(self) -> None:
        for each, attributes in self._objects:
            vars(each).clear()
            vars(each).update(_copied(attributes))
        for parameter in self._model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:  # a block's code may be compiled a few times only
            dynamo.reset()  # type: ignore[attr-defined]
        gc.collect()  # adapters and their optimizer, which refer to each other


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if type(value) in _CONTAINERS else value for name, value in attributes.items()}


def _versions(model: Any) -> list[int]:
    """How often each tensor was changed in place."""
    return [each._version for each in (*model.parameters(), *model.buffers())]
