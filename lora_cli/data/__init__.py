"""From files to micro-batches: sources, examples with a mask of trained tokens, packing, order."""
