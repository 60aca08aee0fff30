"""A model hub on loopback: the part of the Hugging Face hub's protocol that fetching a model uses, and its failures."""
