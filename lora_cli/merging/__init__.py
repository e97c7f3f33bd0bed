"""Base + adapter → an ordinary model folder, and the proof that it is the same model."""
