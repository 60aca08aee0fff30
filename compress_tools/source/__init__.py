"""The checkpoint to compress, seen as MoE layers of experts."""
