"""Names of files that more than one package knows."""

TORCH = (".pth", ".pt", ".bin")
"""Endings of torch files."""
TORCH_STEM = "pytorch_model"
"""How the names of torch files in a folder begin."""
WEIGHTS = (".safetensors", *TORCH)
"""Endings of weight files."""
WORK_SUFFIX = ".streammap-run"
"""Ends the name of the folder in which a result is made."""
COMMIT_MARK = "commit.json"
"""In that folder while a whole result is being put in place."""

SPEC = "streammap.spec.toml"
"""Of a result of a model that only a spec of the user's own serves: that spec."""
RECORD = "streammap.json"
"""Of a result: where it came from, see output/record.py."""
