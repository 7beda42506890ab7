"""Maps of many segments, which are applied unit by unit."""
