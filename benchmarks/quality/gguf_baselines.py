"""Plain baselines as llama.cpp stores them: GGUF's Q4_0 and Q8_0, by the `gguf` package's own quantiser."""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.quality.methods import Method, Outcome
from benchmarks.quality.subject import Checkpoint
from compress_tools.architectures.experts import ExpertWeights
from compress_tools.numerics.products import squared_norm
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design

# What the package can quantise to at 4 and 8 bits with one scale a block; its K-quants it only reads.
GGUF = [Method(f"GGUF {name}", "plain", {"gguf": name}) for name in ("Q4_0", "Q8_0")]


def run_gguf(subject: Checkpoint, methods: list[Method], say: Callable[[str], None]) -> Iterator[Outcome]:
    """Each matrix quantised along its last dimension, as llama.cpp's converter does; nothing where it can't be.

    Args:
        subject: the model.
        methods: of ``GGUF``.
        say: told in a sentence why methods are left out.
    """
    names = ", ".join(method.name for method in methods)
    if find_spec("gguf") is None:
        say(f"left out: {names}: the package gguf is not installed; pip install 'resmoe[bench]'")
        return
    for method in methods:
        block = block_size(method)
        odd = [
            size for size in (subject.source.sizes.hidden_size, subject.source.sizes.intermediate_size) if size % block
        ]
        if odd:
            say(f"left out: {method.name}: rows of {odd[0]} weights are no multiple of its blocks of {block}")
            continue
        yield _quantised(subject, method)


def block_size(method: Method) -> int:
    """Weights that share a scale."""
    constants = import_module("gguf.constants")
    size: int = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[method.options["gguf"]]][0]
    return size


def _quantised(subject: Checkpoint, method: Method) -> Outcome:
    total, experts, errors = 0, {}, []
    for layer in subject.source.layers:
        error = energy = 0.0
        experts[layer] = []
        for dense in subject.read_layer(layer):
            restored = {}
            for projection in subject.source.projections:
                restored[projection], size = _there_and_back(dense.matrix(projection), method.options["gguf"])
                total += size
            total += sum(bias.nbytes for bias in dense.biases.values())
            made = ExpertWeights(restored.get("gate_proj"), restored["up_proj"], restored["down_proj"], dense.biases)
            wanted, found = (rows_to_design(expert_to_rows(one)) for one in (dense, made))
            error += squared_norm(wanted - found)
            energy += squared_norm(wanted)
            experts[layer].append(made)
        errors.append(error / energy)
    return Outcome(
        name=method.name,
        family=method.family,
        options=method.options,
        bytes_disk=total,
        bytes_resident=total,
        bytes_center=0,
        relative_error=sum(errors) / len(errors),
        residual_energy=None,
        experts=experts,
    )


def _there_and_back(weight: Tensor, name: str) -> tuple[Tensor, int]:
    """A matrix quantised and restored, fp32, and the bytes in between."""
    quants = import_module("gguf.quants")
    kind = import_module("gguf.constants").GGMLQuantizationType[name]
    codes = quants.quantize(weight.float().contiguous().numpy(), kind)
    return torch.from_numpy(quants.dequantize(codes, kind)), codes.nbytes
