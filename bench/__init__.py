"""Benchmarks: each prints the table that the README shows. See README.md."""
