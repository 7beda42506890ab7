"""What knows nothing of models: text, JSON, events, process settings."""
