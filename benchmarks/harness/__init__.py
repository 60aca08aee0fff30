"""What benchmarks share: rows, environment, routing, shapes."""
