"""ResMoE checkpoints in transformers."""
