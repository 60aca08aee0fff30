"""What long work reports, and who shows it."""
