"""The operator that takes an optimizer's state along, and the order of a model's parameters."""
