"""LoRA adapters: what adapter_config.json and keys say, and the forms of the merged tensors."""
