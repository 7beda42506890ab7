"""The original tools' front: mapper.py's command line and classes, its table."""
