"""The GPU's kernels: Triton for every coder."""
