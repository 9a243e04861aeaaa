"""8-bit moments and split master weights around any Optax optimizer. Not public."""
