"""One result made by several processes."""
