"""A model of the Hugging Face hub as a source: fetched into the user's cache, or streamed shard by shard."""
