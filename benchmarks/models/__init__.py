"""The models that benchmarks measure: trained, tiny, synthetic."""
