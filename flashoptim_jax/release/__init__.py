"""Gradient release: updates inside the backward pass. Not public."""
