"""Quantised tensors read as plain ones: codes and scales in, bfloat16 out, a strip at a time."""
