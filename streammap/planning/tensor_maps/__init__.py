"""The tensors of a result from those of a source: what changes of axes make of each."""
