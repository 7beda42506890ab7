"""Operators that put units in another order."""
