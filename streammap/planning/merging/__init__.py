"""Several models made one: numbers by place, slices of layers, and methods (a module each)."""
