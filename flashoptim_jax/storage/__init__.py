"""How parameters and optimizer state are stored, and what the format is. Not public."""
