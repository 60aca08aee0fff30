"""Small good checkpoints to begin with: every coder, precision and version of the format, one file or several."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.tiny_drafts import add_draft
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.rest import encode_rows, row_names
from compress_tools.format.schema import (
    BitmapResidual,
    CodedRest,
    LayerSpec,
    LowRankResidual,
    ResMoEFormat,
    version_for,
)
from compress_tools.output.run_record import RECORD_KEY
from compress_tools.pipeline import compress
from compress_tools.source.reader import INDEX_NAME
from tests.resmoe_vllm.layers import grouped_layer, layer_kinds
from tests.resmoe_vllm.twins import HF_NAMES, PROJECTIONS, compress_experts, layer_spec, trellis

Files = dict[str, bytes]

# 3 groups of 32 columns; masks with padding. Heads have 32 columns, fewer than which kernels of vLLM do not take.
EXPERTS, SIZE_I, SIZE_H, LAYERS, VOCAB = 4, 9, 96, 2, 24
OLMOE = {
    "hidden_size": SIZE_H,
    "intermediate_size": SIZE_I,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
}
DTYPE_NAMES = ("float32", "bfloat16", "float16")
CODED_REST = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"),
)


@dataclass(frozen=True)
class Seed:
    """A good checkpoint.

    Attributes:
        name: what it is made of.
        files: its files' content by name.
    """

    name: str
    files: Files

    def write(self, folder: Path) -> Path:
        """Write it into a new folder."""
        return write_files(self.files, folder)


def write_files(files: Files, folder: Path) -> Path:
    """Write files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: Path) -> Files:
    """The files that a checkpoint's loaders read."""
    kept = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {file.name: file.read_bytes() for file in kept}


def make_seeds(folder: Path) -> list[Seed]:
    """All of them; seconds.

    Args:
        folder: an empty one, for what is made on the way.
    """
    kinds = layer_kinds(SIZE_I, SIZE_H) | {"groups": grouped_layer(SIZE_I, SIZE_H)}
    names = sorted(kinds)
    seeds = [
        _by_hand(folder, "+".join(pair), [kinds[kind] for kind in pair], DTYPE_NAMES[number % 3])
        for number, pair in enumerate(zip(names[::2], [*names[1::2], names[0]], strict=False))
    ]
    # Without the keys that came with version 2, which tests' own shorthand gives.
    first = [
        layer_spec(LowRankResidual(projections=PROJECTIONS, rank=3)),
        layer_spec(BitmapResidual(projections=PROJECTIONS, values_per_expert=200), center=()),
    ]
    seeds.append(_by_hand(folder, "version 1", first, "bfloat16", version=1))
    coded = [layer_spec(trellis(3, *PROJECTIONS)), kinds["bitmap_rows"]]
    seeds.append(_by_hand(folder, "coded rest", coded, "bfloat16", rest=CODED_REST))
    return [*seeds, *_written(folder)]


def _by_hand(
    folder: Path,
    name: str,
    specs: list[LayerSpec],
    dtype: str,
    *,
    version: int | None = None,
    rest: tuple[str, ...] = (),
) -> Seed:
    """An OLMoE whose layers are of these specs, in one file."""
    source = save_tiny_model("olmoe", folder / name, DTYPES[dtype], **OLMOE)
    tensors = load_file(source / "model.safetensors")
    layers = dict(enumerate(specs))
    block = CodedRest(bits=8, tensors=rest) if rest else None
    fmt = ResMoEFormat(
        format_version=version or version_for(layers.values(), {}, block),
        written_by="tests",
        dtype=dtype,
        num_experts=EXPERTS,
        hidden_size=SIZE_H,
        intermediate_size=SIZE_I,
        names=HF_NAMES,
        layers=layers,
        rest=block,
    )
    stored: dict[str, Tensor] = dict(tensors)
    compress_experts(fmt, stored)
    for matrix in rest:
        stored |= dict(zip(row_names(matrix), encode_rows(stored.pop(matrix)), strict=True))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = fmt.model_dump(mode="json")
    (source / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, source / "model.safetensors")
    return Seed(f"{name} ({dtype})", read_files(source))


def _written(folder: Path) -> list[Seed]:
    """Checkpoints as ``resmoe compress`` writes them: several files, index, report; biases, drafts, all in codes."""
    small = {"intermediate_size": 24, "num_local_experts": 2, "num_hidden_layers": 2, "hidden_size": 32}
    biased = save_tiny_model(
        "gpt_oss",
        folder / "biased",
        torch.bfloat16,
        vocab_size=VOCAB,
        head_dim=32,
        num_attention_heads=1,
        **small,
    )
    draft = save_tiny_model(
        "glm4_moe", folder / "draft", torch.bfloat16, n_routed_experts=2, moe_intermediate_size=8, hidden_size=32,
        num_attention_heads=1, head_dim=32, vocab_size=VOCAB, num_hidden_layers=2, first_k_dense_replace=0,
        intermediate_size=8,
    )  # fmt: skip
    add_draft(draft, "glm4_moe")
    plain = save_tiny_model("olmoe", folder / "plain", torch.bfloat16, max_shard_size="40kB", **OLMOE)
    recipes = {
        "biases": (biased, {"method": "quantize", "bits": 4, "center": "mean"}),
        "draft": (draft, {"method": "trellis", "bits": 2, "center": "mean", "center_bits": 8}),
        "shards": (plain, {"method": "prune", "value_bits": 8, "center": "mean", "rest_bits": 8}),
    }
    seeds = []
    for name, (source, options) in recipes.items():
        made = folder / f"small-{name}"
        compress(source, made, make_config(workers=1, **options))
        # By the record's digests every change of a text would be found, whatever it says.
        index = json.loads((made / INDEX_NAME).read_text())
        del index[RECORD_KEY]
        (made / INDEX_NAME).write_text(json.dumps(index))
        seeds.append(Seed(name, read_files(made)))
    return seeds
