"""Writes the golden checkpoint of format version 1. Run once for each format version, never to please a test.

python -m tests.compress_tools.golden.make
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress_tools.format.codec import encode_bitmap
from compress_tools.format.schema import ResMoEFormat
from compress_tools.format.tensors import CENTER, U, V, layer_tensors, tensor_name

HERE = Path(__file__).parent
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BLOCK = {
    "written_by": "resmoe 0.1.0",
    "dtype": "bfloat16",
    "num_experts": 2,
    "hidden_size": 4,
    "intermediate_size": 2,
    "names": {
        "expert": "model.layers.{layer}.block_sparse_moe.experts.{expert}",
        "projections": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    },
    "layers": {
        "0": {
            "center": [{"method": "dense", "projections": list(PROJECTIONS)}],
            "residual": [{"method": "bitmap", "projections": list(PROJECTIONS), "values_per_expert": 6}],
        },
        "1": {
            "center": [],
            "residual": [{"method": "low_rank", "projections": list(PROJECTIONS), "rank": 1}],
        },
    },
}


def rows(start: int) -> dict[str, torch.Tensor]:
    """Small whole numbers, exact in bf16: ``[2, 4]`` for each projection."""
    flat = torch.arange(start, start + 24, dtype=torch.float32).view(3, 2, 4)
    return dict(zip(PROJECTIONS, flat, strict=True))


def golden_tensors(fmt: ResMoEFormat) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint."""
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


def main() -> None:
    """Write ``v1/``."""
    fmt = ResMoEFormat.model_validate(BLOCK)
    tensors = golden_tensors(fmt)
    assert set(tensors) == {name for layer in (0, 1) for name in layer_tensors(fmt, layer)}
    target = HERE / "v1"
    target.mkdir(exist_ok=True)
    save_file({**tensors, "lm_head.weight": torch.ones(3, 4)}, target / "model.safetensors")
    config = {"model_type": "mixtral", "quantization_config": fmt.model_dump(mode="json")}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
