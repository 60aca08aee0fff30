"""Models that come with Python code of their own: which of them load only where that code is trusted."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_tools.architectures.base import config_parts

TRUST_OPTION = "--trust-remote-code"


def must_be_trusted(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint loads only with ``trust_remote_code``.

    Where transformers has a class of its own for the model, that one is better: code on the hub is often of an older
    transformers.

    Args:
        directory: where tokenizer_config.json lies.
        config: config.json.
    """
    tokenizer = _read(directory / "tokenizer_config.json")
    own_model = any("AutoConfig" in _auto_map(part) for part in config_parts(config))
    own_tokenizer = "AutoTokenizer" in _auto_map(tokenizer)
    # The import takes seconds.
    if not (own_model or own_tokenizer):
        return False
    model_type, tokenizer_class = str(config.get("model_type")), str(tokenizer.get("tokenizer_class"))
    return (own_model and not _knows_model(model_type)) or (own_tokenizer and not _knows_tokenizer(tokenizer_class))


def missing_code(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Files of Python code that config.json or tokenizer_config.json names and that are not there, ascending."""
    parts = [*config_parts(config), _read(directory / "tokenizer_config.json")]
    modules = {module for part in parts for module in _modules(_auto_map(part))}
    return sorted(f"{module}.py" for module in modules if not (directory / f"{module}.py").is_file())


def _modules(auto_map: Mapping[str, Any]) -> Iterator[str]:
    """The modules beside config.json that an ``auto_map`` names; ``repository--module.Class`` lies elsewhere."""
    for names in auto_map.values():
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and (match := re.fullmatch(r"(\w+)\.\w+", name)) is not None:
                yield match[1]


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("auto_map")
    return found if isinstance(found, dict) else {}


def _knows_model(model_type: str) -> bool:
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return False
    return model_type in CONFIG_MAPPING_NAMES


def _knows_tokenizer(name: str) -> bool:
    try:
        import transformers
    except ImportError:
        return False
    return hasattr(transformers, name)


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
