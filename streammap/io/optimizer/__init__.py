"""Optimizers' states on the disk: where they are, what they hold, and whose they are."""
