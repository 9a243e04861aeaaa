"""States and weights from and for other formats. Not public."""
