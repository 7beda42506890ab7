"""Whether the class that config.json names would load a result."""
