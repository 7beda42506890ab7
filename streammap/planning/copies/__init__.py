"""Copies of units that training can tell apart, while what reads them computes the same."""
