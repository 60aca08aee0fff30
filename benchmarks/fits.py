"""`python -m benchmarks.fits`: which card holds which model, original and compressed, and how much KV cache is left.

Arithmetic alone, from the format's sizes (compress_tools/format/SPEC.md) and the models' published configurations;
`python -m benchmarks.serve` measures the resident expert bytes that it rests on. Weights and KV cache are counted;
activations and the runtime are not, so that 0.9 of a card is taken for the two; vLLM takes 0.92 if nothing is said.
"""

from dataclasses import dataclass

import click
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.synthetic_checkpoint import FAMILIES
from benchmarks.models.synthetic_layer import synthetic_format
from compress_tools.format.tensors import dense_layer_bytes, layer_bytes, row_pointer_bytes

GB = 1e9
# Name: memory, as the maker states it (binary gigabytes).
CARDS = {"RTX 4080 16G": 16, "RTX 4090 24G": 24, "A6000 48G": 48, "A100 80G": 80, "H200 141G": 141}
UTILIZATION = 0.9
# DeepSeekMoE's shared experts and dense first layer have no stand-in among the classes that count the rest.
MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B", "Mixtral-8x7B")
FORMS: dict[str, dict[str, object] | None] = {
    "bf16": None,
    "prune 25 %": {"method": "prune", "retain_ratio": 0.25},
    "low rank 25 %": {"method": "low-rank", "retain_ratio": 0.25},
    "4-bit residual and center": {"method": "quantize", "bits": 4, "center_bits": 4},
    "2-bit residual, 4-bit center": {"method": "quantize", "bits": 2, "center_bits": 4},
}


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of a whole model.

    Attributes:
        experts: routed experts: centers, residuals and row pointers, or dense weights.
        others: everything else, bf16.
        kv_per_token: KV cache of one token, bf16.
    """

    experts: int
    others: int
    kv_per_token: int

    def cached_tokens(self, card_gib: float) -> int:
        """Tokens of KV cache that a card holds beside the weights; negative where the weights don't fit."""
        return int((UTILIZATION * card_gib * 2**30 - self.experts - self.others) // self.kv_per_token)


def expert_bytes(shape: MoEShape, form: dict[str, object] | None) -> int:
    """Resident bytes of all routed experts of a model, by the SPEC's arithmetic."""
    fmt = synthetic_format(shape, **(form or {}))
    one = dense_layer_bytes(fmt) if form is None else layer_bytes(fmt, 0) + row_pointer_bytes(fmt, 0)
    return shape.layers * one


def footprint(shape: MoEShape, form: dict[str, object] | None) -> Footprint:
    """A whole model in one form."""
    prefix, fields = FAMILIES[shape.name]
    few = {"num_experts": shape.experts, "num_local_experts": shape.experts, "intermediate_size": 1}
    config = getattr(transformers, f"{prefix}Config")(
        **fields, **few, moe_intermediate_size=1, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_experts_per_tok=shape.top_k, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    others = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." not in name)
    head = getattr(config, "head_dim", None) or shape.hidden // config.num_attention_heads
    kv_per_token = 2 * 2 * shape.layers * config.num_key_value_heads * head
    return Footprint(expert_bytes(shape, form), 2 * others, kv_per_token)


@click.command()
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
def main(*, markdown: bool) -> None:
    """Print the table."""
    table = Table(
        "model", "form", "experts", "all weights", *CARDS, box=box.MARKDOWN if markdown else box.SIMPLE_HEAD,
        caption=f"thousand tokens of bf16 KV cache beside the weights at {UTILIZATION:g} of the card; -: does not fit",
    )  # fmt: skip
    for name in MODELS:
        for form, options in FORMS.items():
            own = footprint(SHAPES[name], options)
            tokens = [own.cached_tokens(size) for size in CARDS.values()]
            cells = [f"{count / 1000:,.0f}k" if count > 0 else "-" for count in tokens]
            table.add_row(name, form, f"{own.experts / GB:.1f} GB", f"{(own.experts + own.others) / GB:.1f} GB", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
