"""Scores of an oracle on held-out examples, always beside its controls."""
