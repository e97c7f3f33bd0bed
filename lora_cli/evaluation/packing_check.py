"""Before packing is trusted on a model, it is tried: two examples on one row must give what each gives alone."""

from __future__ import annotations

from typing import Any

import torch

from lora_cli.base.attention import packed_inputs
from lora_cli.errors import LoraError


@torch.no_grad()
def packing_difference(model: Any, device: torch.device) -> float:
    """Largest difference of a logit between packed and separate, in standard deviations of the logits.

    Rounding gives about 1e-6 in fp32 and 1e-2 in bf16; a leak gives about 1, for the second example then sees the
    first, or its positions do not start at zero.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    examples = [torch.randint(vocabulary, (length,), generator=generator) for length in (7, 9, 5)]
    together = torch.cat(examples).unsqueeze(0).to(device)
    packed = model(input_ids=together, **packed_inputs([len(e) for e in examples], device), use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=e.unsqueeze(0).to(device), use_cache=False).logits[0] for e in examples])
    return ((packed.float() - alone.float()).abs().max() / alone.float().std()).item()


def require_no_leak(model: Any, device: torch.device) -> None:
    """Raises LoraError if this architecture cannot keep packed examples apart."""
    training = model.training
    model.eval()
    try:
        difference = packing_difference(model, device)
    except (TypeError, ValueError, RuntimeError) as error:
        difference, reason = float("inf"), str(error).splitlines()[0][:200]
    else:
        reason = f"packed and separate logits differ by {difference:.2g} standard deviations"
    finally:
        model.train(training)
    limit = 1e-3 if model.dtype == torch.float32 else 0.2
    if not difference < limit:
        raise LoraError(
            f"{type(model).__name__} does not keep packed examples apart",
            details=[reason],
            fix="write data.packing: false",
        )
