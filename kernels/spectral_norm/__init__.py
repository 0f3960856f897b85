"""Power iterations, scaling and gradients of all weights of a network at once."""
