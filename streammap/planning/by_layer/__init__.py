"""Maps that differ from layer to layer."""
