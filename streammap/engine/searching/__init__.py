"""What is found by reading before a run begins: orders of units."""
