"""An optimizer's state that goes with the weights: maps of gradients, and what steps become."""
