"""Orders of units: which may change places, and which order brings two models together."""
