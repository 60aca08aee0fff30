"""A ResMoE checkpoint in vLLM gives what its restored dense twin gives in plain vLLM."""

import json
import os
import shutil
from pathlib import Path
from statistics import mean

import pytest
from safetensors.torch import load_file, save_file

from compress_tools.errors import CheckpointError, ConfigError, FormatError
from compress_tools.format.schema import parse_format
from compress_tools.format.tensors import group_map_bytes, layer_bytes, row_pointer_bytes
from tests.resmoe_vllm.serving import logprob_gaps, serve, serve_in_subprocess, start
from tests.resmoe_vllm.twins import (
    ALL_KINDS,
    EXPERTS,
    NUM_LAYERS,
    PROJECTIONS,
    VERSION_2_KINDS,
    VERSION_3_KINDS,
    bitmap,
    layer_spec,
    low_rank,
    write_twins,
)

pytestmark = pytest.mark.vllm

SMALL = {0: layer_spec(low_rank(24, *PROJECTIONS)), 1: layer_spec(bitmap(9000, *PROJECTIONS))}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two layers, fp32: one low rank, one bitmap."""
    return write_twins(tmp_path_factory.mktemp("small"), "mixtral", "float32", SMALL, 2)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_fp32_tokens_and_logprobs_are_the_twins(pairs, served, family: str) -> None:
    compressed, twin = (served(folder, dtype="float32") for folder in pairs(family, "float32"))
    assert compressed.tokens == twin.tokens
    assert max(logprob_gaps(compressed, twin)) < 1e-4


def test_coders_mixed_over_layers_and_experts_give_the_twins_tokens(tmp_path: Path, served) -> None:
    """Codes, coded values and factors, equal rows, trellis codes, sums of parts, groups of experts."""
    layers = VERSION_2_KINDS | VERSION_3_KINDS
    compressed_folder, twin_folder = write_twins(tmp_path / "mixed", "mixtral", "float32", layers, NUM_LAYERS)
    compressed, twin = (served(folder, dtype="float32") for folder in (compressed_folder, twin_folder))
    assert compressed.tokens == twin.tokens
    assert max(logprob_gaps(compressed, twin)) < 1e-4
    fmt = parse_format(json.loads((compressed_folder / "config.json").read_text())["quantization_config"])
    for index in layers:
        assert compressed.methods[index] == "ResMoEFusedMoEMethod"
        memory_only = row_pointer_bytes(fmt, index) + group_map_bytes(fmt, index)
        assert compressed.resident_bytes[index] == layer_bytes(fmt, index) + memory_only


def test_bf16_logprobs_are_as_near_the_truth_as_the_twins(pairs, served) -> None:
    """Truth: the stored tensors served in fp32. bf16 inference alone moves logprobs by 0.01 in the mean."""
    folder, twin_folder = pairs("mixtral", "bfloat16")
    compressed, twin = served(folder, dtype="bfloat16"), served(twin_folder, dtype="bfloat16")
    truth = served(folder, dtype="float32")
    assert mean(logprob_gaps(compressed, twin)) < 0.03
    assert mean(logprob_gaps(compressed, truth)) < 1.5 * mean(logprob_gaps(twin, truth))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_served_as_listed_and_stay_compressed(pairs, served, dtype: str) -> None:
    folder = pairs("mixtral", dtype)[0]
    run = served(folder, dtype=dtype)
    fmt = parse_format(json.loads((folder / "config.json").read_text())["quantization_config"])
    expected = {
        index: "ResMoEFusedMoEMethod" if index in ALL_KINDS else "UnquantizedFusedMoEMethod"
        for index in range(NUM_LAYERS)
    }
    assert run.methods == expected
    for index in ALL_KINDS:
        assert run.resident_bytes[index] == layer_bytes(fmt, index) + row_pointer_bytes(fmt, index)


@pytest.mark.slow
def test_compiled_tokens_are_the_eager_twins(small: tuple[Path, Path], served) -> None:
    """VLLM's default: torch.compile on."""
    compressed, twin = (
        serve(small[0], dtype="float32", enforce_eager=False),
        served(small[1], dtype="float32"),
    )
    assert compressed.tokens == twin.tokens
    assert max(logprob_gaps(compressed, twin)) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core per rank")
def test_two_tensor_ranks_give_what_one_gives(pairs, served) -> None:
    folder = pairs("mixtral", "float32")[0]
    one = served(folder, dtype="float32")
    two = serve_in_subprocess(folder, "0|1", dtype="float32", tensor_parallel_size=2)
    assert two.tokens == one.tokens
    assert max(logprob_gaps(two, one)) < 1e-4
    assert all(two.resident_bytes[index] < size for index, size in one.resident_bytes.items())


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core per rank")
def test_two_expert_ranks_give_what_one_gives(small: tuple[Path, Path], served) -> None:
    """All MoE layers are compressed: vLLM's own CPU kernel dies (SIGSEGV) under expert parallelism."""
    one = served(small[0], dtype="float32")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    two = serve_in_subprocess(small[0], "0|1", dtype="float32", **options)
    assert two.tokens == one.tokens
    assert max(logprob_gaps(two, one)) < 1e-4
    assert all(two.resident_bytes[index] < size for index, size in one.resident_bytes.items())


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core per rank")
def test_two_pipeline_stages_give_what_one_gives(small: tuple[Path, Path], served) -> None:
    """Compiled: vLLM's CPU build crashes on eager pipeline stages, plain models too."""
    one = served(small[0], dtype="float32")
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    two = serve_in_subprocess(small[0], "0|1", dtype="float32", **options)
    assert two.tokens == one.tokens
    assert max(logprob_gaps(two, one)) < 1e-4


def test_dummy_weights_are_served(small: tuple[Path, Path]) -> None:
    run = serve(small[0], dtype="float32", load_format="dummy")
    fmt = parse_format(json.loads((small[0] / "config.json").read_text())["quantization_config"])
    assert run.resident_bytes == {i: layer_bytes(fmt, i) + row_pointer_bytes(fmt, i) for i in SMALL}


def test_a_saved_engines_parameters_are_refused(small: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="layer 0: resmoe doesn't support --load-format sharded_state"):
        serve(small[0], dtype="float32", load_format="sharded_state")


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy of ``folder`` whose tensors ``change`` edits in place."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


EXPERT = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("3.w2.resmoe_v", None, rf"layer 0: tensor '{EXPERT}\.3\.w2\.resmoe_v' is missing"),
        # vLLM would drop it in silence
        ("3.w2.resmoe_v", "9.w2.resmoe_v", rf"layer 0: tensor '{EXPERT}\.3\.w2\.resmoe_v' is missing"),
        ("3.w2.resmoe_v", "3.w2.resmoe_u", rf"layer 0: tensor '{EXPERT}\.3\.w2\.resmoe_v' is missing"),
    ],
    ids=["missing", "expert_out_of_range", "wrong_suffix"],
)
def test_a_damaged_checkpoint_stops_vllm(small, tmp_path: Path, old: str, new: str | None, message: str) -> None:
    def change(tensors: dict) -> None:
        tensor = tensors.pop(f"{EXPERT}.{old}")
        if new is not None:
            tensors[f"{EXPERT}.{new}"] = tensor

    with pytest.raises((FormatError, AttributeError), match=message):
        start(damaged(small[0], tmp_path / "damaged", change), dtype="float32")


@pytest.mark.parametrize(
    "name, layer",
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_missing_tensor_outside_of_the_experts_stops_vllm(small, tmp_path: Path, name: str, layer: str) -> None:
    """VLLM checks this for plain models alone."""
    with pytest.raises(CheckpointError, match=f"{layer}: not all of its weight is in the checkpoint"):
        start(damaged(small[0], tmp_path / "damaged", lambda tensors: tensors.pop(name)), dtype="float32")


def test_another_format_version_stops_vllm(small, tmp_path: Path) -> None:
    shutil.copytree(small[0], tmp_path / "version")
    path = tmp_path / "version" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format_version 4 is not readable by this version, which reads 1, 2 and 3"):
        start(tmp_path / "version", dtype="float32")


def test_other_model_sizes_stop_vllm(small, tmp_path: Path) -> None:
    shutil.copytree(small[0], tmp_path / "sizes")
    path = tmp_path / "sizes" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": EXPERTS + 1}))
    with pytest.raises(FormatError, match=f"num_experts {EXPERTS}, the model has {EXPERTS + 1}"):
        start(tmp_path / "sizes", dtype="float32")
