"""When a step has gone wrong: its loss or gradient is NaN or infinite, or its loss is far above that of guessing."""

from __future__ import annotations

import math

_TIMES = 2.0


def what_is_wrong(
    loss: float, grad_norm: float | None, *, first_loss: float | None, vocabulary: int, scaled: bool
) -> str | None:
    """None for a healthy step.

    Guessing evenly costs log(vocabulary) nats a token. A loss above twice that, and above twice the first loss of the
    run, has exploded: the model is confident and wrong. grad_norm: of all gradients together, None while it is not
    known. scaled: fp16 with a loss scale above 1, where gradients overflow now and then; the scaler leaves out such
    updates and lowers the scale.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if loss > (most := _TIMES * max(math.log(vocabulary), first_loss or 0.0)):
        return f"the loss is {loss:.4g}, more than {most:.4g}: twice the loss of guessing or of the first step"
    if grad_norm is not None and not math.isfinite(grad_norm) and not scaled:
        return f"the gradient norm is {grad_norm}"
    return None
