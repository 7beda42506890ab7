"""Places that bytes are in: this machine, the Hub, any fsspec URL."""
