"""Training: the configuration, the optimizer, one update, and the loop over many."""
