"""ResMoE compression: a Hugging Face MoE checkpoint in, a ResMoE checkpoint out (arXiv:2503.06881)."""

__version__ = "0.1.0"
