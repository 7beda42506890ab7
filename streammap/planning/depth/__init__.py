"""Layers of a result chosen from a source's: slices, lists, recipes, and what becomes of each."""
