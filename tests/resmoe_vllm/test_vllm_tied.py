"""Output layers that are tied: which of vLLM's classes never tie, and that a tied model is served by such a class."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.families import MAX_DEVIATION, vllm_logprobs
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.registry import ARCHITECTURES
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore

# Prints by class whether it never ties. Importing all of vLLM's models spoils a process for an engine.
NEVER_TIES = """
import importlib, importlib.util, inspect, json, pathlib
from vllm.model_executor.models import registry

def text(module, name):
    path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    try:
        found = getattr(importlib.import_module(path), name)
    except ModuleNotFoundError:
        return pathlib.Path(importlib.util.find_spec(path).origin).read_text()
    return "".join(inspect.getsource(base) for base in found.__mro__ if base.__module__.startswith("vllm"))

known = {**registry._TEXT_GENERATION_MODELS, **registry._MULTIMODAL_MODELS}
texts = {name: text(*known[name]) for name in NAMES if name in known}
print(json.dumps({name: "ParallelLMHead(" in t and "tie_weights(" not in t for name, t in texts.items()}))
"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The class that a tiny model of each family names."""
    found = {}
    for known in ARCHITECTURES:
        source = save_tiny_model(known.model_type, tmp_path_factory.mktemp("tied") / "source", torch.float32)
        (found[known.model_type],) = json.loads((source / "config.json").read_text())["architectures"]
    return found


@pytest.fixture(scope="module")
def never_ties(classes: dict[str, str]) -> dict[str, bool]:
    """By class of vLLM."""
    script = NEVER_TIES.replace("NAMES", repr(sorted(set(classes.values()))))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.vllm
@pytest.mark.parametrize(
    "architecture", [known for known in ARCHITECTURES if known.vllm], ids=lambda known: known.model_type
)
def test_rows_say_which_classes_have_an_output_layer_of_their_own(
    architecture: MoEArchitecture, classes: dict[str, str], never_ties: dict[str, bool]
) -> None:
    # Without a class of its own a family runs in vLLM's Transformers backend, which ties.
    assert architecture.own_output is never_ties.get(classes[architecture.model_type], False)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_tied_model_is_served_by_a_class_that_never_ties(tmp_path: Path) -> None:
    source = save_tiny_model("olmoe", tmp_path / "source", torch.float32, tie_word_embeddings=True)
    compress(source, tmp_path / "small", make_config(retain_ratio=0.3))
    restore(tmp_path / "small", tmp_path / "dense")
    found, twin = vllm_logprobs(tmp_path / "small"), vllm_logprobs(tmp_path / "dense")
    assert (found - twin).abs().max() <= MAX_DEVIATION
