"""A ResMoE checkpoint read back: described, verified, restored."""
