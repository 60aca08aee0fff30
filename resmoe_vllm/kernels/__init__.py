"""Kernels: reference.py is the truth, every other file is one way to compute it."""
