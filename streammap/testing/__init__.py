"""The public test kit: failing disks and a small Hub, to test launchers and storages against."""
