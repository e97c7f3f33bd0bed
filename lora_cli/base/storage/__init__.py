"""How a frozen weight is stored: one file a kind, and the registry that everything else asks."""
