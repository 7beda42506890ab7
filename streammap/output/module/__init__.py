"""load_into: a module filled in place."""
