"""Coverage-guided fuzzing of each parser: see docs/security.md, and run.py for how to."""
