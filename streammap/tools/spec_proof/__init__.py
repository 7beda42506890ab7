"""`streammap spec verify`: a spec tested on a tiny random model."""
