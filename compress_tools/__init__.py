"""ResMoE compression: a Hugging Face MoE checkpoint in, a ResMoE checkpoint out (arXiv:2503.06881)."""

from compress_tools.hf.import_hook import register_when_imported
from compress_tools.version import __version__

__all__ = ["__version__"]

register_when_imported()
