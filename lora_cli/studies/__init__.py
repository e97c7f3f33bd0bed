"""What adapters are: looked at as values, after they were trained."""
