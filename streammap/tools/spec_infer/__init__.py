"""`streammap spec infer`: a spec written by probing a transformers class."""
