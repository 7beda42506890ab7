"""The public test kit: what launchers and storages can be tested against."""
