"""Places where bytes are; one module a place."""
