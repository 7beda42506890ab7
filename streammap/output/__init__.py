"""Bytes to a result: shards, journal, commit, side files, record, ranks, upload, modules."""
