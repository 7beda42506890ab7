"""How names of weight files end."""

TORCH = (".pth", ".pt", ".bin")
WEIGHTS = (".safetensors", *TORCH)

RECORD = "streammap.json"
"""Of a result: where it came from, see output/record.py."""
