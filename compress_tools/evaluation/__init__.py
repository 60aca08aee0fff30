"""What a checkpoint says: perplexity, and its distance from the original's predictions; or lm-eval's tasks."""
