"""Checkpoint tensors to the parameters of one rank, and to what kernels see of them."""
