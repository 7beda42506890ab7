"""Two checkpoints of one model: which of their tensors, and of their settings, are the same."""
