"""Operators: each module turns plans into a plan. Options in, maps and compensations out."""
