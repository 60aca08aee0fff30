"""Products of large matrices, experts side by side, clocks and samples."""
