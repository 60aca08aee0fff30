"""The CPU's kernels: C++, and plain torch for every coder."""
