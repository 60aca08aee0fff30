"""The GPU kernels compiled at real shapes, for many cards, on a machine that has none of them."""
