"""Architecture specs: one TOML file each, see `streammap/architecture.py`."""
