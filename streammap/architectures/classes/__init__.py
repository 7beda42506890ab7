"""What transformers' classes say of a model: which one a config.json is of, and its names."""
