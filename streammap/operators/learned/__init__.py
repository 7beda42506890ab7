"""Operators that apply maps from files of others."""
