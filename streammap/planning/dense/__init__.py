"""Matrices of dense maps, which are read a block at a time and never held as a whole."""
