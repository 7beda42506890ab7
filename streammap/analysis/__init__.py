"""Results and plans looked at: summary, inspection, health, diff, verify."""
