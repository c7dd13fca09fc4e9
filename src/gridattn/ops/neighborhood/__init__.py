"""Generalized neighborhood attention: per-axis kernel size, stride, dilation and causality on grids of rank 1 to 3."""
