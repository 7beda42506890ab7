"""File formats: safetensors, torch's zip form, torch.distributed.checkpoint."""
