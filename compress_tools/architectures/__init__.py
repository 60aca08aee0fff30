"""Model families: the only place that knows on-disk names."""
