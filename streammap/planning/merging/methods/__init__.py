"""Methods of merging, a module each: what one tensor of the result is made of."""
