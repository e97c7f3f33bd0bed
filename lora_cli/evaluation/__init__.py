"""Measuring and using a model: the loss, perplexity, the packing check, generation."""
