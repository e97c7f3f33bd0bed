"""Before a run: what a recipe will do, and a first recipe for a model and data."""
