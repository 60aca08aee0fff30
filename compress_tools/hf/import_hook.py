"""Tell transformers about ResMoE when, and only when, a program uses transformers' quantizers.

``import compress_tools`` must make ``AutoModelForCausalLM.from_pretrained(DIR)`` work, and must stay cheap for
programs that never touch transformers. So registration waits until ``transformers.modeling_utils``, which every
``from_pretrained`` of a model needs, has been imported whole.
"""

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.modeling_utils"


def register_when_imported() -> None:
    """Register now if TARGET is loaded, otherwise once it is. Repeatable."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        from compress_tools.hf.quantizer import register
    except ImportError as err:
        # A transformers that moved the names we use must still import; only our loading is lost, and says so.
        logging.getLogger(__name__).warning("ResMoE checkpoints won't load in this transformers: %s", err)
        return
    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET once, by the usual finders, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The usual loader, then registration."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()
