"""The loop, its optimizer, checkpoints and progress."""
