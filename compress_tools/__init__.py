"""ResMoE compression: a Hugging Face MoE checkpoint in, a ResMoE checkpoint out (arXiv:2503.06881)."""

__version__ = "0.1.0"

from compress_tools.transformers_hook import register_when_imported

register_when_imported()
