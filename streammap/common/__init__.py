"""Helpers that know nothing of models: text, JSON, events, process settings."""
