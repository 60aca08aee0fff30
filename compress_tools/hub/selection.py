"""Which files of a repository are fetched, and why the others are not; told by names alone."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from compress_tools.format.shard_file import is_file_name

WEIGHTS = ".safetensors"
NOT_NAMED = "weights that are not the model's: its index does not name them"
# Other formats of the same weights, and training state.
_OTHER_WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".mlmodel",
    ".msgpack",
    ".nemo",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".tflite",
)
# What configs, tokenizers, chat templates, notes and licences are written in.
_TEXTS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".yaml", ".yml")
_CODE = ".py"
# Folders that hold the model once more, as its makers' own code reads it.
_DUPLICATES = ("original", "metal", "onnx", "openvino")
_NOTICES = ("license", "licence", "notice", "usage_policy", "use_policy")


def is_weights(name: str) -> bool:
    """Whether a file may be one of the model's shards."""
    return name.endswith(WEIGHTS) and is_file_name(name) and not name.startswith("consolidated")


def is_code(name: str) -> bool:
    """Whether a file is code that config.json may ask for."""
    return name.endswith(_CODE)


def is_hidden(name: str) -> bool:
    """Whether a file is nobody's part of a model: .gitattributes, .cache and the like."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def why_left_out(name: str, *, trusted_code: bool) -> str | None:
    """Why a file is not fetched; None: it is.

    Args:
        name: in the repository, with ``/``.
        trusted_code: config.json, or the tokenizer's, names code to run.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _OTHER_WEIGHTS or path.name.startswith("consolidated"):
        return "weights in another format"
    if suffix == WEIGHTS:
        return None if is_weights(name) else NOT_NAMED
    if path.parts[0] in _DUPLICATES and len(path.parts) > 1:
        return "a second copy of the model, in another format"
    if suffix == _CODE:
        return None if trusted_code else "code that no config names"
    if suffix in _TEXTS or path.stem.lower().startswith(_NOTICES):
        return None
    return "nothing that loads or serves the model reads it"


def names_code(texts: Iterable[object]) -> bool:
    """Whether any of these configs (as read from JSON) asks for code of the repository."""
    return any(isinstance(text, dict) and "auto_map" in text for text in texts)
