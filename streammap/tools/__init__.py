"""Programs on the API: spec proof and inference, the original's front, demo."""
