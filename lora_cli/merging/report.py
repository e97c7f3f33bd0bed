"""What a merge says of itself, and the limits that it must keep."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.errors import CheckFailed
from lora_cli.merging.quantized import rounding_lines

_KEPT_AT_LEAST = 0.9  # share of the adapter's effect that a merge must keep
# KL that arithmetic alone can explain, nats a token: in fp32 (measured 1e-12 to 1e-11), and in 16 bits
NOISE = {"fp32": 1e-10, "16 bits": 2e-3}


@dataclass(frozen=True)
class MergeReport:
    """How near the merged model is to base + adapter, over the tokens that were compared.

    kl: mean KL divergence in nats a token from base + adapter, on the weights merged onto, to the merged model.
    adapter_effect: the same from base + adapter to the base alone, the yardstick. kl_trained: from the model that was
    trained, where other weights were merged onto. top1_agreement: share of positions with the same likeliest token.
    largest_difference: of two logits. compared_in: fp32, or 16 bits where memory did not allow more. block_by_block:
    whether weights were read from the files a block at a time, because all of them do not fit into memory in fp32.
    stop_tokens: added to generation_config.json.
    proof: full; replay or none, where nothing was compared and these figures are None. replayed: tensors made a second
    time and found in the files, bit for bit. streamed: whether the base was read a tensor at a time.
    bases_compared: losses on held-out rows, merged onto the trained and onto the original weights, and what the
    original ones gain, with its interval (`paired_gain`); None where they were not compared.
    quantized: of a folder whose layers were rounded, `Rounding.facts`; the other figures are of the model before that.
    """

    output: str
    onto: str
    dtype: str
    layers: int
    tokens_compared: int
    kl: float | None = None
    adapter_effect: float | None = None
    top1_agreement: float | None = None
    compared_in: str | None = None
    tokens: str = ""
    stop_tokens: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proof: str = "full"
    replayed: int = 0
    streamed: bool = True
    bases_compared: dict[str, Any] | None = None
    largest_difference: float | None = None
    block_by_block: bool = False
    kl_trained: float | None = None
    quantized: dict[str, Any] | None = None

    @property
    def kept(self) -> float | None:
        """Share of the adapter's effect that the merge keeps; 1 is all of it. None where nothing was compared."""
        if self.kl is None or self.adapter_effect is None:
            return None
        return 1 - self.kl / self.adapter_effect if self.adapter_effect > 0 else 1.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.kept}

    @property
    def effect(self) -> str:
        """What is kept, in words."""
        if self.kept is None:
            return "the merged model was not compared with base + adapter"
        if not self.adapter_effect:
            return "the adapter changes nothing"
        before = "" if self.quantized is None else "before rounding, it "
        return f"{before}keeps {self.kept:.2%} of the adapter's effect"

    def lines(self) -> list[str]:
        """What was written, and how near it is to base + adapter."""
        dtype = self.dtype if self.quantized is None else f"{self.dtype}, then in {self.quantized['kind']}"
        first = f"merged {self.layers} layers onto the {self.onto} weights, in {dtype}: {self.output}"
        again = f"{self.replayed} tensors made again from base and adapter are in the files, bit for bit"
        if self.kl is None:
            return [first, *([again] if self.replayed else []), f"{self.effect} (--proof {self.proof})"]
        how = f"{self.compared_in}, block by block," if self.block_by_block else self.compared_in
        other = "" if self.kl_trained is None else f"; from the model that was trained: KL {self.kl_trained:.2g}"
        return [
            first,
            f"{self.effect}: compared with base + adapter in {how} on {self.tokens_compared} tokens "
            f"{self.tokens}, KL {self.kl:.2g} nats a token (the adapter itself changes {self.adapter_effect:.2g}), "
            f"same top token at {self.top1_agreement:.1%}, logits at most {self.largest_difference:.2g} apart{other}",
            again,
            *([] if self.quantized is None else rounding_lines(self.quantized)),
        ]


def require_same(report: MergeReport, adapter: Path) -> None:
    """Raises CheckFailed for a merge that lost too much, or figures with NaN in them. adapter: its folder."""
    if report.kl is None or report.kept is None or report.compared_in is None:
        return
    require_number(report.kl, adapter)
    if report.kl > NOISE[report.compared_in] and report.kept < _KEPT_AT_LEAST:
        written = report.dtype
        lost = "" if written == "fp32" else f": {written} cannot hold changes as small as this adapter's"
        raise CheckFailed(
            f"the merged model keeps {max(0.0, report.kept):.0%} of what the adapter changes{lost}",
            where=report.output,
            details=[
                f"KL from base + adapter: {report.kl:.2g} nats a token; the adapter itself changes "
                f"{report.adapter_effect:.2g} (compared in {report.compared_in} on {report.tokens_compared} tokens)"
            ],
            fix="nothing was written; " + ("report this" if written == "fp32" else "write it with --dtype fp32"),
        )


def require_number(measured: float, adapter: Path) -> None:
    """A comparison with nan is never true, so no limit would be passed."""
    if not math.isfinite(measured):
        what = "base + adapter produce NaN or infinity: their weights are damaged, or too large"
        fix = "nothing was written; copy the adapter and download the base model again"
        raise CheckFailed(what, where=str(adapter), fix=fix)
