"""Bytes: storages, file formats, opened checkpoints."""
