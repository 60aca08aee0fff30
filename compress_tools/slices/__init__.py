"""One compression on several machines."""
