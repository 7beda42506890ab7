"""How names of weight files end."""

TORCH = (".pth", ".pt", ".bin")
WEIGHTS = (".safetensors", *TORCH)
