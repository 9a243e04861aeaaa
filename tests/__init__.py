"""Tests, and in `support` and `checks` what they share and sample."""
