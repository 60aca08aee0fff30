"""The compression engine at the true shapes of published models."""
