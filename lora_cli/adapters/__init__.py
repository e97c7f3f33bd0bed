"""Low-rank adapters: the layer, where it is attached, how it starts, and the file it is shipped in."""
