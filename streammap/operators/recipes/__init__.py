"""Recipes of other tools, read as requests: each becomes operators of this package."""
