"""The version, as a constant: reading package metadata would cost 80 ms at start-up."""

VERSION = "0.1.0"
