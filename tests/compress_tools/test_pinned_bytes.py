"""What compression writes, pinned: behaviour that no move of code may change.

``python -m tests.compress_tools.test_pinned_bytes`` writes the pins anew; only for a change of behaviour that is
wanted, said in its commit. Weights come from numpy, whose generator gives every machine the same numbers.

Codes, masks and kept values are the same on every processor that was tried. Low-rank factors are not in their last
bits: they are pinned for each kind of processor that has a row, and by name, shape, dtype and error everywhere.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress_tools.config import make_config
from compress_tools.format.loading_guard import GUARD_KEY, GUARD_TEXT
from compress_tools.pipeline import compress
from compress_tools.source.model_fit import ALLOW_VARIABLE

PINS = Path(__file__).with_name("pinned_bytes.json")
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 16,
}
# Every method, and every way in which its tensors differ.
METHODS: dict[str, dict[str, Any]] = {
    "prune": {},
    "prune-coded": {"value_bits": 4, "group_size": 32},
    "prune-rows": {"prune_rows": "equal"},
    "prune-rows-coded": {"prune_rows": "equal", "value_bits": 8},
    "quantize": {"method": "quantize", "bits": 3, "center_bits": 8},
    "quantize-plain": {"method": "quantize", "bits": 4, "center": "none"},
    "quantize-mean": {"method": "quantize", "bits": 2, "center": "mean", "center_bits": 4, "group_size": 32},
    "low-rank": {"method": "low-rank"},
    "low-rank-coded": {"method": "low-rank", "factor_bits": 8, "low_rank_form": "per-projection"},
    "low-rank-quantize": {"method": "low-rank+quantize", "retain_ratio": 0.1},
    "one-layer": {"layers": "top:1", "center": "git-rebasin"},
}


def write_source(directory: Path) -> Path:
    """A Mixtral of related experts, written without transformers: nothing but these numbers decides its bytes."""
    random = np.random.default_rng(7)
    hidden, inner, experts = MIXTRAL["hidden_size"], MIXTRAL["intermediate_size"], MIXTRAL["num_local_experts"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    tensors = {"model.embed_tokens.weight": draw(16, hidden), "lm_head.weight": draw(16, hidden)}
    tensors["model.norm.weight"] = draw(hidden)
    for layer in range(MIXTRAL["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.self_attn.q_proj.weight"] = draw(hidden, hidden)
        tensors[f"{stem}.block_sparse_moe.gate.weight"] = draw(experts, hidden)
        shared = {"w1": draw(inner, hidden), "w3": draw(inner, hidden), "w2": draw(hidden, inner)}
        for expert in range(experts):
            order = torch.from_numpy(random.permutation(inner))
            for name, matrix in shared.items():
                moved = matrix[:, order] if name == "w2" else matrix[order]
                own = moved + 0.3 * draw(*matrix.shape)
                tensors[f"{stem}.block_sparse_moe.experts.{expert}.{name}.weight"] = own
    directory.mkdir(parents=True)
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(MIXTRAL))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def pins_of(directory: Path) -> dict[str, Any]:
    """What a checkpoint is, in plain data; nothing in it depends on path, version or time."""
    tensors: dict[str, Any] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no iterator
                tensor = opened.get_tensor(name).contiguous()
                digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
                tensors[name] = f"{shard.name} {tensor.dtype} {list(tensor.shape)} {digest}"
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].pop("written_by")
    # Newer than the pins, and a sentence for people.
    assert config.pop(GUARD_KEY) == GUARD_TEXT
    report = json.loads((directory / "resmoe_report.json").read_text())
    report.pop("shards")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry.split()[0] for name, entry in tensors.items()}
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return {
        "files": files,
        "config": config,
        "index_metadata": index["metadata"],
        "recipe": json.loads((directory / "resmoe_recipe.json").read_text()),
        "report": report,
        "tensors": tensors,
    }


def processor() -> str:
    """Vendor, family and model of this processor, and what torch uses of it: matrix libraries choose paths by them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(tuple(part.strip() for part in line.partition(":")[::2]) for line in reversed(lines) if line.strip())
    named = [fields.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    return " ".join([*named, torch.backends.cpu.get_cpu_capability()])


def is_factor(name: str) -> bool:
    """Whether a tensor's last bits follow the processor: factors, and what is coded after them."""
    return name.rsplit("resmoe_", 1)[-1] in ("u", "v", "u_codes", "v_codes", "u_scales", "v_scales", "codes", "scales")


def approximately(value: Any) -> Any:
    """The same with every float compared to a part in ten thousand."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-4, abs=1e-7) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("pinned") / "source")


def run(source: Path, target: Path, method: str) -> dict[str, Any]:
    # Of attention it has a part, and not in the sizes that config.json says.
    with mock.patch.dict(os.environ, {ALLOW_VARIABLE: "1"}):
        compress(source, target, make_config(**METHODS[method], workers=1))
    return pins_of(target)


def split(method: str, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What holds on every machine, and digests that hold on one kind of processor."""
    own = {}
    if "low-rank" in METHODS[method].get("method", ""):
        for name, entry in found["tensors"].items():
            if is_factor(name):
                found["tensors"][name], _, own[name] = entry.rpartition(" ")
    return found, own


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_the_pinned_ones(source: Path, tmp_path: Path, method: str):
    pins = json.loads(PINS.read_text())
    found, own = split(method, run(source, tmp_path / "out", method))
    expected = pins["everywhere"][method]
    assert found["tensors"] == expected["tensors"]
    assert found["report"] == approximately(expected["report"])
    assert {**found, "report": None} == {**expected, "report": None}
    here = pins["processors"].get(processor())
    if here is not None:
        assert own == here[method]


def test_every_method_is_pinned():
    pins = json.loads(PINS.read_text())
    assert set(pins["everywhere"]) == set(METHODS)
    assert all(set(own) == set(METHODS) for own in pins["processors"].values())


def main(directory: Path) -> None:
    """Pin what this machine writes; rows of other kinds of processors are kept, if the rest did not change."""
    source = write_source(directory / "source")
    made = {method: split(method, run(source, directory / method, method)) for method in METHODS}
    old = json.loads(PINS.read_text()) if PINS.exists() else {"everywhere": {}, "processors": {}}
    everywhere = {method: found for method, (found, _) in made.items()}
    kept = old["processors"] if old["everywhere"] == everywhere else {}
    processors = {**kept, processor(): {method: own for method, (_, own) in made.items()}}
    PINS.write_text(json.dumps({"everywhere": everywhere, "processors": processors}, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
