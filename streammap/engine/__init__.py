"""Linear forms to bytes in bounded memory: tiles, programs, kernels, threads."""
