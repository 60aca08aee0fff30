"""IBM's Granite MoE: ``block_sparse_moe.input_linear`` ``[E, 2I, H]`` and ``output_linear`` ``[E, H, I]``; tied."""

from dataclasses import replace

from compress_tools.architectures.base import MoEArchitecture
from compress_tools.architectures.layouts import OneByOne, Stacked

EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}"
LAYOUTS = (
    Stacked("layers.{layer}.block_sparse_moe", ("input_linear.weight",), "output_linear.weight"),
    Stacked("layers.{layer}.block_sparse_moe.experts"),
    OneByOne(EXPERT),
)
# vLLM's loaders know the published name alone.
ROUTER = ((r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),)

GRANITEMOE = MoEArchitecture(
    model_type="granitemoe",
    title="Granite-3 MoE",
    models=("granite-3.0-1b-a400m (bf16)", "granite-3.1-3b-a800m (bf16)"),
    expert=EXPERT,
    layouts=LAYOUTS,
    intermediate_size_keys=("intermediate_size",),
    renames=ROUTER,
    tied=True,
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    title="Granite MoE with shared experts",
    models=("moe-7b-1b-active-shared-experts (bf16)",),
)
GRANITEMOEHYBRID = replace(
    GRANITEMOE,
    model_type="granitemoehybrid",
    title="Granite-4",
    models=("granite-4.0-h-tiny (bf16)", "granite-4.0-h-small (bf16)"),
)
