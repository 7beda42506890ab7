"""Operators that change which layers there are."""
