"""Writes the golden checkpoints, one for each format version. Run once for each version, never to please a test.

python -m tests.compress_tools.format.golden.make

Values and codes are written down by rule, not found by an encoder: encoders may get better, the format may not change.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress_tools.format.dtypes import DTYPES
from compress_tools.format.packing import pack_codes, pack_mask
from compress_tools.format.parts.bitmap import MASK, encode_bitmap
from compress_tools.format.parts.dense import CENTER
from compress_tools.format.parts.low_rank import U, V
from compress_tools.format.schema import ResMoEFormat, parse_format
from compress_tools.format.tensors import layer_tensors, tensor_name

HERE = Path(__file__).parent
REST = HERE / "v3_rest"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALL = list(PROJECTIONS)
NAMES = {
    "expert": "model.layers.{layer}.block_sparse_moe.experts.{expert}",
    "projections": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}
BLOCK = {
    "written_by": "resmoe 0.1.0",
    "dtype": "bfloat16",
    "num_experts": 2,
    "hidden_size": 4,
    "intermediate_size": 2,
    "names": NAMES,
    "layers": {
        "0": {
            "center": [{"method": "dense", "projections": ALL}],
            "residual": [{"method": "bitmap", "projections": ALL, "values_per_expert": 6}],
        },
        "1": {
            "center": [],
            "residual": [{"method": "low_rank", "projections": ALL, "rank": 1}],
        },
    },
}
# H = 36 columns: a second group of 4 columns beside one of 32, rows of codes with padding, no whole mask word.
BLOCK_2 = {
    "written_by": "resmoe 0.2.0",
    "dtype": "bfloat16",
    "num_experts": 3,
    "hidden_size": 36,
    "intermediate_size": 2,
    "names": NAMES,
    "layers": {
        "0": {
            "center": [{"method": "quantized", "projections": ALL, "bits": 4, "group_size": 32}],
            "residual": [{"method": "quantized", "projections": ALL, "bits": 3, "group_size": 32}],
        },
        "1": {
            "center": [{"method": "dense", "projections": ["up_proj"]}],
            "groups": [
                {
                    "experts": [1],
                    "residual": [
                        {"method": "low_rank", "projections": ["gate_proj", "up_proj"], "rank": 2, "factor_bits": 8},
                        {"method": "quantized", "projections": ALL, "bits": 2},
                    ],
                },
                {
                    "experts": [0, 2],
                    "residual": [
                        {"method": "bitmap", "projections": ["gate_proj", "up_proj"], "values_per_expert": 16,
                         "value_bits": 4, "group_size": 32},
                        {"method": "bitmap_rows", "projections": ["down_proj"], "values_per_row": 4, "value_bits": 8},
                    ],
                },
            ],
        },
        "2": {
            "center": [],
            "residual": [{"method": "bitmap_rows", "projections": ALL, "values_per_row": 4}],
        },
    },
}  # fmt: skip
# Trellis codes of every width over a center in them, without one and by groups of experts; the last layer is a draft.
BLOCK_3 = {
    "written_by": "resmoe 0.3.0",
    "dtype": "bfloat16",
    "num_experts": 2,
    "hidden_size": 36,
    "intermediate_size": 2,
    "names": {**NAMES, "drafts": {"3": "mtp.layers.0.block_sparse_moe.experts.{expert}"}},
    "layers": {
        "0": {
            "center": [{"method": "trellis", "projections": ALL, "bits": 4, "group_size": 32}],
            "residual": [{"method": "trellis", "projections": ALL, "bits": 1}],
        },
        "1": {
            "center": [],
            "groups": [
                {"experts": [0], "residual": [{"method": "trellis", "projections": ALL, "bits": 2}]},
                {"experts": [1], "residual": [{"method": "trellis", "projections": ALL, "bits": 3, "group_size": 32}]},
            ],
        },
        "3": {
            "center": [{"method": "quantized", "projections": ALL, "bits": 8}],
            "residual": [{"method": "trellis", "projections": ALL, "bits": 4}],
        },
    },
}
KEPT_COLUMNS = (1, 3, 31, 34)


def block(version: int) -> dict[str, Any]:
    """A whole ``quantization_config``."""
    return {"quant_method": "resmoe", "format_version": version, **{1: BLOCK, 2: BLOCK_2, 3: BLOCK_3}[version]}


def rows(start: int) -> dict[str, torch.Tensor]:
    """Small whole numbers, exact in bf16: ``[2, 4]`` for each projection."""
    flat = torch.arange(start, start + 24, dtype=torch.float32).view(3, 2, 4)
    return dict(zip(PROJECTIONS, flat, strict=True))


def golden_tensors(fmt: ResMoEFormat) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint of version 1."""
    tensors = {}
    for projection, value in rows(0).items():
        tensors[tensor_name(fmt, 0, None, projection, CENTER)] = value.bfloat16()
    for expert in range(2):
        keep = {projection: torch.zeros(2, 4, dtype=torch.bool) for projection in PROJECTIONS}
        for projection in PROJECTIONS:
            keep[projection][expert, 1] = keep[projection][expert, 3] = True
        for (projection, suffix), value in encode_bitmap(rows(100 * (expert + 1)), keep, torch.bfloat16).items():
            tensors[tensor_name(fmt, 0, expert, projection, suffix)] = value
        left = torch.tensor([[1.0], [-2.0]]) * (expert + 1)
        tensors[tensor_name(fmt, 1, expert, "gate_proj", U)] = left.bfloat16()
        for number, projection in enumerate(PROJECTIONS):
            right = torch.tensor([[1.0, 2.0, 3.0, 4.0]]) + number
            tensors[tensor_name(fmt, 1, expert, projection, V)] = right.bfloat16()
    return tensors


def golden_tensors_2(fmt: ResMoEFormat) -> dict[str, torch.Tensor]:
    """All tensors of versions 2 and 3: codes count up, scales are powers of two, ``KEPT_COLUMNS`` are kept."""
    tensors = {}
    for layer in fmt.layers:
        for number, (name, spec) in enumerate(layer_tensors(fmt, layer).items()):
            if spec.suffix == MASK:
                keep = torch.zeros(2, 36, dtype=torch.bool)
                keep[:, KEPT_COLUMNS] = True
                tensors[name] = pack_mask(keep)
            elif spec.codes is not None:
                bits, columns = spec.codes
                shape = (*spec.shape[:-1], columns)
                tensors[name] = pack_codes((torch.arange(columns).expand(shape) + number) % 2**bits, bits)
            elif "scales" in spec.suffix:
                tensors[name] = torch.full(spec.shape, 0.5).cumprod(1).to(DTYPES[spec.dtype])
            else:
                tensors[name] = (torch.arange(torch.Size(spec.shape).numel()).view(spec.shape) - number).bfloat16()
    return tensors


def block_rest() -> dict[str, Any]:
    """The block of version 3 with a coded output layer, of layer 3 alone."""
    whole = block(3)
    return {
        **whole,
        "names": {key: value for key, value in whole["names"].items() if key != "drafts"},
        "layers": {"3": whole["layers"]["3"]},
        "rest": {"bits": 8, "tensors": ["lm_head.weight"]},
    }


def rest_tensors() -> dict[str, torch.Tensor]:
    """An output layer ``[3, 4]`` in codes: scales 0.5, 0 and 2."""
    codes = torch.tensor([[127, -2, 0, 1], [0, 0, 0, 0], [-127, 3, -4, 5]], dtype=torch.int8)
    return {"lm_head.resmoe_row_codes": codes, "lm_head.resmoe_row_scales": torch.tensor([[0.5], [0], [2]]).bfloat16()}


def main() -> None:
    """Write ``v1/``, ``v2/``, ``v3/`` and ``v3_rest/``, whichever is not there yet."""
    for version, make in ((1, golden_tensors), (2, golden_tensors_2), (3, golden_tensors_2)):
        target = HERE / f"v{version}"
        if target.exists():
            continue
        fmt = parse_format(block(version))
        tensors = make(fmt)
        assert set(tensors) == {name for layer in fmt.layers for name in layer_tensors(fmt, layer)}
        target.mkdir()
        save_file({**tensors, "lm_head.weight": torch.ones(3, 4)}, target / "model.safetensors")
        config = {"model_type": "mixtral", "quantization_config": fmt.model_dump(mode="json")}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    if not REST.exists():
        fmt = parse_format(block_rest())
        REST.mkdir()
        save_file({**golden_tensors_2(fmt), **rest_tensors()}, REST / "model.safetensors")
        config = {"model_type": "mixtral", "quantization_config": fmt.model_dump(mode="json")}
        (REST / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
