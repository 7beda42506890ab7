"""Forms of a result beside safetensors: which bytes its files have around the tensors."""
