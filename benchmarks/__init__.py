"""Measurements of this repository: `python -m benchmarks.NAME`, each with a table and `--json FILE`."""
