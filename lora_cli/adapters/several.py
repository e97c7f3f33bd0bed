"""Several adapters on one base: switched without loading, added with weights, another one for each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.attach import leave_out
from lora_cli.adapters.file import AdapterFile, attach_adapter
from lora_cli.adapters.layer import LoRALinear, OverLinear
from lora_cli.base.source import BaseSource
from lora_cli.errors import LoraError

Mix = Mapping[str, float]  # adapter → its weight in a row; empty: the base alone


class Rows:
    """What the rows of the batch in work use, known to all layers.

    weights: (rows or 1, adapters); a single row is for all of them. shape: rows and tokens that the model was given.
    """

    def __init__(self, model: nn.Module):
        self.weights = torch.zeros(1, 0)
        self.shape: tuple[int, ...] = ()
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = (*inputs, named.get("input_ids"), named.get("inputs_embeds"))
        self.shape = next(tuple(each.shape[:2]) for each in given if each is not None)

    def require_all(self, x: Tensor) -> None:
        """Raises LoraError for an input of which nobody knows which token is of which row."""
        rows, tokens = self.shape
        if len(x) != (rows if x.ndim > 2 else rows * tokens):
            raise LoraError(
                "rows with different adapters are not possible in a layer that sees only some of the tokens, such as "
                "an expert",
                fix="add --batch-size 1",
            )


class SeveralLinear(OverLinear):
    """base_layer(x) + Σ weight · scaling · B A x over the adapters, each row of a batch with weights of its own.

    The A of all adapters are stacked, (Σ ranks, in), and their Bᵀ, (Σ ranks, out). A batch takes the part of
    them from the first to the last adapter that it uses: one product for A x and one for B, and between them each row's
    weights, zero where an adapter is not the row's. So ranks and scalings may differ by adapter and layer, and an
    adapter without this layer has rank 0 in it. For use, not for training.
    """

    def __init__(self, base_layer: nn.Module, rows: Rows, A: Tensor, B: Tensor, absent: int):
        """A, B: empty, (0, in) and (0, out). absent: how many adapters there are already, none of them here."""
        super().__init__()
        self.base_layer, self.rows, self.A, self.B = base_layer, rows, A, B
        self.ranks, self.scalings = [0] * absent, [0.0] * absent
        self._taken: Tensor | None = None  # the rows' weights that the next two are of
        self._part, self._weights = slice(0), A

    def add(self, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Each as A (rank, in), Bᵀ (rank, out) and scaling."""
        self.A = torch.cat([self.A, *(A for A, _, _ in adapters)])
        self.B = torch.cat([self.B, *(B for _, B, _ in adapters)])
        self.ranks += [len(A) for A, _, _ in adapters]
        self.scalings += [scaling for _, _, scaling in adapters]

    def _take(self) -> tuple[slice, Tensor]:
        """The part of A and B in use, and for it the rows' weights with the scaling: (rows or 1, 1, ranks) in fp32."""
        weights = self.rows.weights
        if self._taken is not weights:
            used = weights.any(0).nonzero().flatten().tolist()
            several = slice(used[0], used[-1] + 1) if used else slice(0)
            ranks, start = self.ranks[several], sum(self.ranks[: several.start])
            scaled = weights[:, several] * torch.tensor(self.scalings[several])
            self._weights = (
                scaled.repeat_interleave(torch.tensor(ranks, dtype=torch.long), 1).unsqueeze(1).to(self.A.device)
            )
            self._part, self._taken = slice(start, start + sum(ranks)), weights
        return self._part, self._weights

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features) in the base layer's output dtype."""
        out = self.base_layer(x)
        part, weights = self._take()
        if not weights.numel():
            return out
        if len(weights) > 1:
            self.rows.require_all(x)
        low = x.reshape(-1, x.shape[-1]) @ self.A[part].to(x.dtype).T  # (tokens, ranks)
        low = (low.unflatten(0, (len(weights), -1)) * weights).flatten(0, 1).to(out.dtype)
        return torch.addmm(out.reshape(-1, out.shape[-1]), low, self.B[part].to(out.dtype)).view(out.shape)


class Several:
    """Adapters beside each other on one model, by name. Until `use` says otherwise the base computes alone."""

    def __init__(self, model: Any, base: BaseSource):
        self.model, self.base = model, base
        self.names: list[str] = []
        self._rows = Rows(model)
        self._layers: dict[str, SeveralLinear] = {}

    def add(self, adapters: Mapping[str, AdapterFile]) -> None:
        """Hold further ones, under new names; the base computes alone then.

        Raises LoraError as `attach_adapter` does; then nothing has changed.
        """
        for name, layer in self._layers.items():
            self.model.set_submodule(name, layer.base_layer)
        try:
            parts = [self._parts(adapter) for adapter in adapters.values()]
        finally:
            for name, layer in self._layers.items():
                self.model.set_submodule(name, layer)
        for name, (A, B, _) in {name: pair for part in parts for name, pair in part.items()}.items():
            if name not in self._layers:
                base_layer = self.model.get_submodule(name)
                self._layers[name] = SeveralLinear(base_layer, self._rows, A[:0], B[:0], len(self.names))
                self.model.set_submodule(name, self._layers[name])
        for name, layer in self._layers.items():
            absent = (layer.A[:0], layer.B[:0], 0.0)
            layer.add([part.get(name, absent) for part in parts])
        self.names += adapters
        self.use([{}])

    def _parts(self, adapter: AdapterFile) -> dict[str, tuple[Tensor, Tensor, float]]:
        """By module: A, Bᵀ and the scaling, in the dtype of the computation."""
        layers = attach_adapter(self.model, adapter, self.base)
        leave_out(self.model, layers)
        dtype, found = self.model.get_input_embeddings().weight.dtype, {}
        for name, layer in layers.items():
            if not isinstance(layer, LoRALinear):
                fix = "use it alone"
                raise LoraError(f"{type(layer).__name__} cannot be used beside others", where=adapter.folder, fix=fix)
            A, B = layer.cast(dtype)
            found[name] = A, B.T.contiguous(), layer.scaling
        return found

    def use(self, rows: Sequence[Mix]) -> None:
        """Each row of the batches to come with these adapters; a single one is for all. Nothing is loaded or moved."""
        weights = torch.tensor([[row.get(name, 0.0) for name in self.names] for row in rows])
        same = bool((weights == weights[:1]).all())
        self._rows.weights = weights[:1] if same else weights
