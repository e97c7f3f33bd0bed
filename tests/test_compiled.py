"""torch.compile for the blocks: what it does not say by itself."""

from __future__ import annotations

import logging

import torch

from lora_cli.base.compiled import say_when_dynamo_gives_up


def test_a_part_that_torch_gives_up_compiling_is_said_once():
    """It is logged where nobody reads it, and the run is slower than it was promised to be."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    before = logger.handlers, logger.propagate, logger.level
    said: list[str] = []
    say_when_dynamo_gives_up(said.append)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):  # type: ignore[attr-defined]
            compiled = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
            for factor in (1, 2, 3, 4):
                assert compiled(torch.ones(2), factor).tolist() == [factor, factor]
    finally:
        logger.handlers, logger.propagate, logger.level = before
        torch._dynamo.reset()
    assert len(said) == 1
    assert "gave up" in said[0]
