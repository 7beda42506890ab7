"""Operators: each module turns plans into a plan."""
