"""The version, as a constant: reading package metadata would slow the start."""

VERSION = "0.1.0"
