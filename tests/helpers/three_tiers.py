"""Prices of three tiers, each dearer than the one before."""

PRICES = ((0.05, 0.05), (0.2, 0.2), (1.0, 1.0))
"""US dollars per million prompt and completion tokens."""
