"""ResMoE compression: a Hugging Face MoE checkpoint in, a ResMoE checkpoint out (arXiv:2503.06881)."""

from compress_tools.version import __version__

__all__ = ["__version__", "register_with_transformers"]


def register_with_transformers() -> None:
    """Make ``AutoModel....from_pretrained(DIR)`` load ResMoE checkpoints; without it they are refused. Repeatable."""
    # Only here: the import takes seconds, and the command and vLLM's processes can do without it.
    from compress_tools.hf.quantizer import register

    register()
