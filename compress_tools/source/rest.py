"""Which matrices beside the routed experts may be stored in codes by row: told by names, dtypes and shapes alone.

What is named here vLLM builds as linear layers that take a quantisation, or as the vocabulary's embedding and output
layer. All else stays as it is: routers and gates, norms, biases, convolutions, a state space's own parameters, small
projections beside them, indexers, multi-token prediction, and whatever else than the decoder a model has.
"""

import re
from collections.abc import Mapping

from compress_tools.format.dtypes import SAFETENSORS_NAMES
from compress_tools.format.rest import WEIGHT
from compress_tools.format.schema import WeightDtype
from compress_tools.source.completeness import is_embedding
from compress_tools.source.moe_source import MoESource

LINEAR = (
    # attention
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    # what stands in attention's place: linear attention, state spaces, convolutions
    "in_proj", "out_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_z",
    # dense layers and shared experts
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "input_linear", "output_linear",
)  # fmt: skip
OUTPUT = "lm_head.weight"
# Modules under which nothing is coded whatever it is called.
EXACT_MODULES = frozenset({"experts", "indexer", "compressor", "router", "gate", "mtp"})


def rest_matrices(source: MoESource, copied: Mapping[str, str], dtype: WeightDtype) -> tuple[str, ...]:
    """Names, in the output, of the copied tensors that are stored in codes by row.

    Args:
        source: the checkpoint.
        copied: ``MoESource.copied``: names there, and names here.
        dtype: the experts'; what is stored in another stays as it is, as a model keeps it for a reason.
    """
    reader, root = source.reader, source.names.expert.removesuffix(source.architecture.expert)
    experts = {name for layer in source.layers for name in source.expected(layer)}
    return tuple(
        output
        for output, name in copied.items()
        if name not in experts
        and len(reader.shape(name)) == 2
        and min(reader.shape(name)) > 0
        and reader.dtype(name) == SAFETENSORS_NAMES[dtype]
        and output.removesuffix(WEIGHT).rpartition(".")[2] not in source.architecture.exact_rest
        and _may_be_coded(output, root, source.architecture.num_layers(reader.config))
    )


def _may_be_coded(name: str, root: str, layers: int | None) -> bool:
    if is_embedding(name, root):
        return True
    if name.endswith(OUTPUT):
        before = name.removesuffix(OUTPUT)
        return root.startswith(before) and (not before or before.endswith("."))
    match = re.fullmatch(re.escape(f"{root}layers.") + r"(\d+)\.(.+)" + re.escape(WEIGHT), name)
    if match is None or (layers is not None and int(match[1]) >= layers):
        return False
    *modules, leaf = match[2].split(".")
    return leaf in LINEAR and not EXACT_MODULES.intersection(modules)
