"""The center expert: exact row assignments and the barycenter over them."""
