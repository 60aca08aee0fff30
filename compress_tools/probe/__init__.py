"""Is a center worth it? Asked of a sample, before any compression."""
