"""Pure functions on tensors: the mathematics of each mechanism, without parameters or state."""
