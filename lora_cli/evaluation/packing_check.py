"""Before packing is trusted on a model, it is tried: two examples on one row must give what each gives alone."""

from __future__ import annotations

from typing import Any

import torch

from lora_cli.base.attention import packed_inputs
from lora_cli.errors import LoraError

_ROUNDING_SHARE = 0.25  # of what a leak changes, that 16-bit rounding may change


@torch.no_grad()
def packing_difference(model: Any, device: torch.device) -> tuple[float, float]:
    """Largest difference of a logit from each example alone: (packed, leaking), in deviations of the logits.

    leaking is the yardstick: the same row read as one example, where the second sees the first and its positions do
    not start at zero. Packed as it should be, only rounding is left: about 1e-6 in fp32, 1e-2 in bf16.
    """

    def difference(logits: torch.Tensor) -> float:
        return ((logits.float() - alone).abs().max() / alone.std()).item()

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    examples = [torch.randint(vocabulary, (length,), generator=generator) for length in (7, 40, 5)]  # one is not tiny
    together = torch.cat(examples).unsqueeze(0).to(device)
    alone = torch.cat([model(input_ids=e.unsqueeze(0).to(device), use_cache=False).logits[0] for e in examples]).float()
    packed = model(input_ids=together, **packed_inputs([len(e) for e in examples], device), use_cache=False).logits[0]
    leaking = model(input_ids=together, use_cache=False).logits[0]
    return difference(packed), difference(leaking)


def require_no_leak(model: Any, device: torch.device) -> None:
    """Raises LoraError if this architecture cannot keep packed examples apart."""
    training = model.training
    model.eval()
    try:
        difference, leaking = packing_difference(model, device)
    except (TypeError, ValueError, RuntimeError) as error:
        difference, leaking, reason = float("inf"), 0.0, str(error).splitlines()[0][:200]
    else:
        reason = f"packed, logits differ by {difference:.2g} standard deviations; with a leak by {leaking:.2g}"
    finally:
        model.train(training)
    limit = 1e-3 if model.dtype == torch.float32 else _ROUNDING_SHARE * leaking
    if not difference < limit:
        raise LoraError(
            f"{type(model).__name__} does not keep packed examples apart",
            details=[reason],
            fix="write data.packing: false",
        )
