"""Format-valid random checkpoints of any shape and method, and their dense twin, for timing.

    python -m benchmarks.models.synthetic_checkpoint OUT --shape OLMoE-1B-7B --layers 8                    # dense, bf16
    python -m benchmarks.models.synthetic_checkpoint OUT --shape OLMoE-1B-7B --layers 8 --method low-rank  # compressed

Everything but the experts is at its true size and comes from the transformers class. An expert costs the time of
writing it: one random expert a layer, shifted for each of the others.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.models.reference_models.corpus import read_corpus
from benchmarks.models.reference_models.tokenizer import save_tokenizer, train_tokenizer
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.format.parts.bitmap import MASK
from compress_tools.format.rest import encode_rows, row_names
from compress_tools.format.tensors import layer_tensors
from compress_tools.output.outline import make_outline
from compress_tools.output.target import make_target
from compress_tools.output.writer import CheckpointWriter
from compress_tools.source.reader import CheckpointReader
from resmoe_vllm.weights.dummy import dummy_tensors

# shape -> (prefix of the transformers classes, fields beside the MoE's sizes); attention as published.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE-1B-7B": ("Olmoe", {"vocab_size": 50304, "num_attention_heads": 16, "num_key_value_heads": 16}),
    "DeepSeekMoE-16B": ("Olmoe", {"vocab_size": 102400, "num_attention_heads": 16, "num_key_value_heads": 16}),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    ),
    "Mixtral-8x7B": ("Mixtral", {"vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8}),
}
# The fields that hold E and I; a class ignores the others' names.
_EXPERTS_FIELDS = ("num_experts", "num_local_experts")
_ROWS_FIELDS = ("intermediate_size", "moe_intermediate_size")
_FEW_ROWS = 8
CONTEXT = 1024
TOKENS = 1024  # of the tokenizer; the other rows of the output matrix are zero, so that none of them is ever drawn

_EXPERT_ZERO = re.compile(r"(?P<before>.*\.experts\.)0(?P<after>\..*)")


def write_dense(out: Path, shape: MoEShape, layers: int, seed: int = 0) -> None:
    """Write the original of a shape: bf16, ``layers`` decoder layers.

    Raises:
        CheckpointError: ``out`` is there already.
    """
    if out.exists():
        raise CheckpointError(f"{out}: is there already; remove it or choose another directory")
    identity = {"synthetic": {"shape": shape.name, "layers": layers, "seed": seed}}
    with CheckpointWriter(out, identity, overwrite=True) as writer:
        _write_dense(writer, shape, layers, seed)


def _write_dense(writer: CheckpointWriter, shape: MoEShape, layers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    config, tensors = _few_experts(writer.staging, shape, layers, seed)
    others, experts = _split(tensors)
    for name in others:
        if name.endswith("gate.weight"):
            others[name] = _random((shape.experts, shape.hidden), generator)
    others["lm_head.weight"][TOKENS:] = 0
    shards: dict[str, tuple[str, ...]] = {}
    total = 0

    def write(shard: str, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        writer.write_shard(shard, tensors, {})
        shards[shard] = tuple(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())

    write("others.safetensors", others)
    for layer, names in enumerate(_by_layer(experts, layers)):
        tensors = {}
        for name in names:
            small = experts[name].shape
            first = _random(tuple(shape.intermediate if size == _FEW_ROWS else size for size in small), generator)
            parts = _EXPERT_ZERO.fullmatch(name)
            for expert in range(shape.experts):
                tensors[f"{parts['before']}{expert}{parts['after']}"] = first.roll(expert)
        write(f"layer-{layer}.safetensors", tensors)
    corpus = (module.text for module in read_corpus(max_train_bytes=10**6).train)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_tokenizer(corpus, TOKENS, CONTEXT), Path(folder))
        for file in Path(folder).iterdir():
            writer.copy_file(file, Path(file.name))
    writer.finish(config, shards, total)


def write_compressed(out: Path, dense: Path, **options: Any) -> None:
    """Write what ``resmoe compress`` with ``options`` would make of a dense twin, with random values.

    Raises:
        ResMoEError: as ``resmoe compress``.
    """
    reader = CheckpointReader(dense)
    config = make_config(**options)
    target = make_target(reader, config)
    outline = make_outline(dense, config.recipe(), target)
    with CheckpointWriter(out, {"synthetic": outline.recipe}) as writer:
        for shard in target.shards:
            if shard.layer is None:
                tensors = {}
                for name, copied in zip(shard.names, shard.copied, strict=True):
                    weight = reader.get(copied)
                    if name in target.fmt.rest_tensors:
                        tensors |= zip(row_names(name), encode_rows(weight), strict=True)
                    else:
                        tensors[name] = weight
            else:
                stored = dummy_tensors(target.fmt, target.fmt.layers[shard.layer])
                tensors = {}
                for name, spec in layer_tensors(target.fmt, shard.layer).items():
                    one = stored[spec.projection, spec.suffix]
                    # Bitmaps keep as many values in every expert; the same ones do.
                    tensors[name] = (
                        one.clone() if spec.suffix == MASK else one.flatten().roll(spec.expert or 0).view_as(one)
                    )
            writer.write_shard(shard.filename, tensors, {})
            del tensors
        for file in reader.other_files():
            writer.copy_file(file, file.relative_to(reader.path))
        total = outline.expert_bytes_after + target.other_bytes_after
        writer.finish(outline.config, {name: tuple(names) for name, (_, names) in outline.shards.items()}, total)


def _few_experts(folder: Path, shape: MoEShape, layers: int, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json of the shape, tensors of the model with few and small experts); scratch files in ``folder``."""
    prefix, fields = FAMILIES[shape.name]
    sizes = {**dict.fromkeys(_EXPERTS_FIELDS, shape.top_k), **dict.fromkeys(_ROWS_FIELDS, _FEW_ROWS)}
    config = getattr(transformers, f"{prefix}Config")(
        **fields, **sizes, hidden_size=shape.hidden, num_hidden_layers=layers, num_experts_per_tok=shape.top_k,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch, max_shard_size="1TB")
        tensors = load_file(Path(scratch) / "model.safetensors")
        saved = json.loads((Path(scratch) / "config.json").read_text())
    for names, size in ((_EXPERTS_FIELDS, shape.experts), (_ROWS_FIELDS, shape.intermediate)):
        saved |= {name: size for name in names if name in saved}
    return saved, tensors


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(everything but experts, the first expert of each layer)."""
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return others, {name: tensor for name, tensor in tensors.items() if _EXPERT_ZERO.fullmatch(name)}


def _by_layer(names: dict[str, Tensor], layers: int) -> list[list[str]]:
    return [sorted(name for name in names if f".layers.{layer}." in name) for layer in range(layers)]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (shape[-1] ** -0.5 * torch.randn(shape, generator=generator)).bfloat16()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), default="OLMoE-1B-7B", show_default=True)
@click.option("--layers", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--method", help="As in `resmoe compress`. Default: dense.")
@click.option("--retain-ratio", default=0.25, show_default=True)
@click.option("--dense", type=click.Path(path_type=Path, exists=True), help="An existing dense twin to imitate.")
def main(out: Path, name: str, layers: int, method: str | None, retain_ratio: float, dense: Path | None) -> None:
    """Write one random checkpoint to OUT."""
    if method is None:
        write_dense(out, SHAPES[name], layers)
    elif dense is not None:
        write_compressed(out, dense, method=method, retain_ratio=retain_ratio)
    else:
        with tempfile.TemporaryDirectory(dir=out.resolve().parent) as scratch:
            write_dense(Path(scratch) / "dense", SHAPES[name], layers)
            write_compressed(out, Path(scratch) / "dense", method=method, retain_ratio=retain_ratio)
    click.echo(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
