"""A stranger's checkpoint does nothing but load or be refused: random changes, and those that were once found."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_tools.errors import CheckpointError, FormatError, NumericalError, ResMoEError
from compress_tools.format.finite import ALLOW_VARIABLE
from compress_tools.format.tensors import is_resmoe_name
from compress_tools.report import REPORT_NAME
from compress_tools.source.reader import INDEX_NAME
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from tests.fuzz import loaders
from tests.fuzz.mutants import ByteRandom, Mutant, Shard, mutate, trap
from tests.fuzz.seeds import Files, Seed, make_seeds, write_files
from tests.fuzz.trial import try_mutant

LOADERS: dict[str, Callable[[Path], Any]] = {
    "verify": verify,
    "transformers": loaders.by_transformers,
    "plugin": loaders.by_plugin,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    loaders.register()
    made = make_seeds(tmp_path_factory.mktemp("seeds"))
    return {seed.name.split(" (")[0]: seed for seed in made}


@settings(max_examples=60)
@given(number=st.integers(0, 18), choices=st.binary(min_size=40, max_size=80))
def test_changed_checkpoints(number: int, choices: bytes, seeds: dict[str, Seed]) -> None:
    seed = list(seeds.values())[number]
    mutant = mutate(seed.name, seed.files, ByteRandom(choices))
    trial = try_mutant(mutant)
    assert trial.outcomes
    assert not trial.faults, mutant.changes


def test_good_checkpoints_are_served_by_all(seeds: dict[str, Seed]) -> None:
    assert len(seeds) == 19
    for seed in seeds.values():
        trial = try_mutant(Mutant(seed.name, seed.files, (), (), ours=True))
        assert set(trial.outcomes.values()) == {"served"}, (seed.name, trial.sentences)
        assert not trial.faults, seed.name


def with_config(files: Files, change: Callable[[dict[str, Any]], object]) -> Files:
    config = json.loads(files["config.json"])
    change(config)
    return {**files, "config.json": json.dumps(config).encode()}


def with_tensor(files: Files, name: str, octets: bytes) -> Files:
    """The tensor's first bytes changed."""
    shard = Shard(files["model.safetensors"])
    shard.octets[name] = octets + shard.octets[name][len(octets) :]
    return {**files, "model.safetensors": shard.pack()}


@pytest.mark.parametrize("count", [2**53, 10**30])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_count_of_experts_is_not_counted_up_to(
    loader: str, count: int, seeds: dict[str, Seed], tmp_path: Path
) -> None:
    files = with_config(
        seeds["version 1"].files, lambda config: config["quantization_config"].update(num_experts=count)
    )
    with pytest.raises(FormatError, match=rf"config\.json counts {count} experts, in all there are 56 tensors"):
        LOADERS[loader](write_files(files, tmp_path / "x"))


@pytest.mark.parametrize("count", [2**53, 10**30])
def test_experts_are_not_counted_where_there_are_no_weights(count: int, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """vLLM could make weights up."""
    good = {name: content for name, content in seeds["version 1"].files.items() if name.endswith(".json")}
    files = with_config(good, lambda config: config["quantization_config"].update(num_experts=count))
    with pytest.raises(FormatError, match=rf"counts {count} experts, and there are no safetensors"):
        loaders.by_plugin(write_files(files, tmp_path / "x"))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_sizes_are_not_made_where_there_are_no_weights(key: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    good = {name: content for name, content in seeds["version 1"].files.items() if name.endswith(".json")}
    files = with_config(good, lambda config: config["quantization_config"].update({key: 10**30}))
    with pytest.raises(FormatError, match=rf"counts weights of {10**30} columns, and there are no safetensors"):
        loaders.by_plugin(write_files(files, tmp_path / "x"))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_matrix_in_codes_without_columns(loader: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    def empty(shard: Shard) -> None:
        name = "lm_head.resmoe_row_codes"
        shard.header[name]["shape"][1], shard.octets[name] = 0, b""

    folder = write_files(with_shards(seeds["coded rest"].files, empty), tmp_path / "x")
    with pytest.raises(FormatError, match=r"row_codes' has shape \[24, 0\], expected two dimensions, none of them 0"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_long_name_is_cut_in_the_sentence(loader: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    def lengthen(config: dict[str, Any]) -> None:
        names = config["quantization_config"]["names"]
        names["expert"] *= 50

    folder = write_files(with_config(seeds["version 1"].files, lengthen), tmp_path / "x")
    with pytest.raises(Exception, match=r"names\.expert must hold \{layer\} once") as caught:
        LOADERS[loader](folder)
    assert len(str(caught.value)) < 500


def test_a_config_of_which_no_numbers_can_be_made(seeds: dict[str, Seed], tmp_path: Path) -> None:
    """No weight is wrong: the rotation's frequencies are computed."""
    files = with_config(seeds["version 1"].files, lambda config: config["rope_parameters"].update(rope_theta=0))
    with pytest.raises(
        NumericalError, match=r"config\.json: 'model\.rotary_emb\.inv_freq', computed from it, holds NaN"
    ):
        loaders.by_transformers(write_files(files, tmp_path / "x"))


def test_more_layers_than_tensors_are_not_built(seeds: dict[str, Seed], tmp_path: Path) -> None:
    files = with_config(seeds["version 1"].files, lambda config: config.update(num_hidden_layers=2**63))
    folder = write_files(files, tmp_path / "x")
    with pytest.raises(CheckpointError, match="counts 9223372036854775808 layers, in all there are 56 tensors"):
        loaders.by_transformers(folder)
    with pytest.raises(ResMoEError, match="num_hidden_layers of a olmoe model is 9223372036854775808"):
        verify(folder)


@pytest.mark.parametrize("act", [loaders.by_transformers, loaders.by_vllm], ids=["transformers", "vllm"])
def test_layers_are_not_built_where_there_are_no_weights(
    act: Callable[[Path], Any], seeds: dict[str, Seed], tmp_path: Path
) -> None:
    """Pickles stand in their place, which are read after the model is built, if at all."""
    good = {name: content for name, content in seeds["version 1"].files.items() if name.endswith(".json")}
    files = with_config(good, lambda config: config.update(num_hidden_layers=2**64))
    folder = write_files({**files, "pytorch_model.bin": b"no weights"}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"counts {2**64} as num_hidden_layers, in all there are 0 tensors"):
        act(folder)


# A pattern of bytes at the beginning of a tensor, and what is said of it.
NUMBERS = {
    "NaN in a center": ("low_rank-joint", "0.mlp.experts.0.up_proj.resmoe_center", b"\x00\x7e", "holds NaN or Inf"),
    "Inf in a factor": ("low_rank-joint", "1.mlp.experts.2.gate_proj.resmoe_u", b"\x00\x7c", "holds NaN or Inf"),
    "NaN in a scale": ("quantized-2bit", "0.mlp.experts.3.down_proj.resmoe_scales", b"\xc0\x7f", "holds NaN or Inf"),
    "a scale too large": (
        "quantized-2bit",
        "1.mlp.experts.3.down_proj.resmoe_scales",
        b"\x7f\x7f",
        r"holds a scale of which codes make 1\.19e\+39, beyond float32",
    ),
    "a scale too large for float16": (
        "quantized-8bit-each",
        "0.mlp.experts.1.down_proj.resmoe_scales",
        b"\x00\x45",
        r"holds a scale of which codes make 2\.61e\+05, beyond float16",
    ),
    "a negative scale of a trellis": (
        "trellis",
        "0.mlp.experts.1.down_proj.resmoe_trellis_scales",
        b"\x00\xbf",
        r"holds a negative scale -0\.5, expected none below zero",
    ),
}


@pytest.mark.parametrize("loader", [*LOADERS, "restore"])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_are_none_are_not_served(case: str, loader: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    start, name, octets, sentence = NUMBERS[case]
    seed = next(seed for key, seed in seeds.items() if key.startswith(start))
    files = with_tensor(seed.files, f"model.layers.{name}", octets)
    folder = write_files(files, tmp_path / "x")
    act = LOADERS.get(loader, lambda path: restore(path, tmp_path / "dense"))
    with pytest.raises(NumericalError, match=rf"{name}'?:? {sentence}"):
        act(folder)
    assert not (tmp_path / "dense").exists()


def test_a_large_factor_of_float16_does_not_overflow(seeds: dict[str, Seed]) -> None:
    """What it restores to is small, and so is a token's answer."""
    seed = next(seed for key, seed in seeds.items() if key.startswith("low_rank-joint"))
    name, place = "model.layers.1.mlp.experts.3.gate_proj.resmoe_v", 2 * 152

    def enlarge(shard: Shard) -> None:
        before = shard.octets[name]
        shard.octets[name] = before[:place] + b"\xff\x7b" + before[place + 2 :]

    trial = try_mutant(Mutant(seed.name, with_shards(seed.files, enlarge), (name,), (), ours=True))
    assert not trial.faults
    assert trial.outcomes["twin"] == "served"


# Of an OLMoE: one tensor of each kind that this project does not write.
PLAIN = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.gate.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("octets", [b"\xc0\x7f", b"\x80\xff"], ids=["NaN", "-Inf"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_weights_that_are_not_finite(
    name: str, octets: bytes, seeds: dict[str, Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(with_tensor(seeds["version 1"].files, name, octets), tmp_path / "x")
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    for act in LOADERS.values():
        with pytest.raises(NumericalError, match=rf"'{re.escape(name)}' holds NaN or Inf, expected finite numbers"):
            act(folder)
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    for act in LOADERS.values():
        act(folder)


def test_vllm_reads_no_plain_weight_that_is_not_finite(seeds: dict[str, Seed], tmp_path: Path) -> None:
    """A norm, which no method of the plugin's serves; by vLLM's own loader."""
    files = with_tensor(seeds["version 1"].files, PLAIN[2], b"\xc0\x7f")
    with pytest.raises(NumericalError, match=rf"x: '{re.escape(PLAIN[2])}' holds NaN or Inf"):
        loaders.by_vllm(write_files(files, tmp_path / "x"))


@pytest.mark.parametrize("name", PLAIN)
def test_vllm_serves_no_weight_as_it_was_made(name: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """By its own loader, which asks for whole checkpoints only where a model is not quantised."""
    module = name.removesuffix(".weight").replace("q_proj", "qkv_proj")
    files = dropped(seeds["version 1"].files, name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(module)}.*(is in the checkpoint|as vLLM calls it)"):
        loaders.by_vllm(write_files(files, tmp_path / "x"))


@pytest.mark.parametrize("loader", [*LOADERS, "restore"])
def test_rows_of_codes_that_overflow(loader: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """The plugin's own layers of such rows are vLLM's to make: see ``tests/resmoe_vllm/test_coded_rest.py``."""
    files = with_tensor(seeds["coded rest"].files, "lm_head.resmoe_row_scales", b"\x7f\x7f")
    folder = write_files(files, tmp_path / "x")
    act = {**LOADERS, "restore": lambda path: restore(path, tmp_path / "dense")}[loader]
    if loader == "plugin":
        assert sorted(act(folder)) == [0, 1]
        return
    with pytest.raises(FormatError, match=r"lm_head.*holds a scale of 3\.39e\+38, whose weights are beyond bfloat16"):
        act(folder)


@pytest.mark.parametrize("value", [float("inf"), 1.5, -1, True, "8", 2**63, [1]])
def test_offsets_that_are_none(value: object, seeds: dict[str, Seed], tmp_path: Path) -> None:
    content = seeds["version 1"].files["model.safetensors"]
    count = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + count])
    header["lm_head.weight"]["data_offsets"][0] = value
    text = json.dumps(header).encode()
    files = {**seeds["version 1"].files, "model.safetensors": len(text).to_bytes(8, "little") + text}
    folder = write_files(files, tmp_path / "x")
    for act in LOADERS.values():
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt shard"):
            act(folder)


@pytest.mark.parametrize("kind", range(6))
def test_code_of_a_checkpoint_is_never_run(kind: int, seeds: dict[str, Seed]) -> None:
    """Modules that config.json names, and pickles beside weights or in their place."""
    pick, made = ByteRandom(bytes([kind]) * 40), dict(seeds["version 1"].files)
    done = trap(made, pick)
    assert done is not None
    trial = try_mutant(Mutant("version 1", made, (done[0],), ("trap",), ours=False))
    assert not trial.faults


HUGE = """
import json, resource, sys
from pathlib import Path
import torch
from tests.fuzz import loaders
from tests.fuzz.trial import forget_peak, peak_bytes, resident_bytes
from compress_tools.errors import ResMoEError
loaders.register()
good, huge = Path(sys.argv[1]), Path(sys.argv[2])
for act in (loaders.by_verify, loaders.by_plugin, loaders.by_transformers):
    act(good)
    forget_peak()
    before = resident_bytes()
    try:
        act(huge)
    except ResMoEError as err:
        print(json.dumps([act.__name__, peak_bytes() - before, str(err)]))
"""


def test_two_hundred_bytes_that_ask_for_gigabytes(seeds: dict[str, Seed], tmp_path: Path) -> None:
    """The block says that experts are of 2**40 weights, and so does the header of a file of 200 bytes."""
    seed = seeds["version 1"]

    def enlarge(config: dict[str, Any]) -> None:
        for place in (config, config["quantization_config"]):
            place.update(hidden_size=2**20, intermediate_size=2**20)

    entry = {"dtype": "BF16", "shape": [2**20, 2**20], "data_offsets": [0, 2**41]}
    header = json.dumps({"model.layers.0.mlp.experts.0.up_proj.resmoe_center": entry}).encode()
    files = {**with_config(seed.files, enlarge), "model.safetensors": len(header).to_bytes(8, "little") + header}
    assert len(files["model.safetensors"]) < 200
    folders = [write_files(seed.files, tmp_path / "good"), write_files(files, tmp_path / "huge")]
    done = subprocess.run(
        [sys.executable, "-c", HUGE, *map(str, folders)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [row[0] for row in rows] == ["by_verify", "by_plugin", "by_transformers"]
    for name, taken, sentence in rows:
        assert taken < 16 * 2**20, (name, taken)
        assert "model.safetensors: truncated or corrupt shard" in sentence


def test_the_same_expert_twice_for_one_token(seeds: dict[str, Seed], tmp_path: Path) -> None:
    """Both weights count: ``layer_input`` has such a token first."""
    folder = seeds["quantized-2bit+quantized-3bit"].write(tmp_path / "x")
    _, weights, ids = loaders.layer_input(4, 96, torch.float32)
    assert ids[0, 0] == ids[0, 1]
    assert weights[0].min() > 0
    answers, truth = loaders.by_plugin(folder), loaders.layer_truth(folder)
    for index, answer in answers.items():
        torch.testing.assert_close(answer[0].double(), truth[index].answer[0], rtol=2e-3, atol=2e-3)


def with_shards(files: Files, change: Callable[[Shard], object]) -> Files:
    """All weight files changed, an index that is up to date, and no report."""
    shards = {name: Shard(content) for name, content in files.items() if name.endswith(".safetensors")}
    for shard in shards.values():
        change(shard)
    index = {"weight_map": {tensor: name for name, shard in shards.items() for tensor in shard.octets}}
    kept = {name: content for name, content in files.items() if name != REPORT_NAME}
    return {**kept, **{name: shard.pack() for name, shard in shards.items()}, INDEX_NAME: json.dumps(index).encode()}


def dropped(files: Files, tensor: str) -> Files:
    """The same without a tensor."""
    return with_shards(files, lambda shard: shard.octets.pop(tensor, None))


def doubled(files: Files, tensor: str, name: str) -> Files:
    """The same with a copy of a tensor."""

    def add(shard: Shard) -> None:
        if tensor in shard.octets:
            shard.header[name], shard.octets[name] = shard.header[tensor], shard.octets[tensor]

    return with_shards(files, add)


def tensors_of(files: Files) -> list[str]:
    shards = [Shard(content) for name, content in files.items() if name.endswith(".safetensors")]
    return [name for shard in shards for name in shard.octets]


def refused_by_verify(files: Files, folder: Path) -> str:
    """What is said of them; overwrites what is in the folder."""
    with pytest.raises(ResMoEError) as caught:
        verify(write_files(files, folder))
    return str(caught.value)


@pytest.mark.parametrize("number", range(19))
def test_any_tensor_that_its_layers_format_asks_for(number: int, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """One that is missing, and one more: for each projection and suffix of the first and last expert."""
    files = list(seeds.values())[number].files
    own = [name for name in tensors_of(files) if is_resmoe_name(name) and not re.search(r"experts\.[12]\.", name)]
    assert len(own) > 10
    for name in own:
        assert repr(name) in refused_by_verify(dropped(files, name), tmp_path / "x"), name
        stem, _, suffix = name.rpartition(".resmoe_")
        extra = f"{stem}.resmoe_{'bias' if suffix != 'bias' else 'u'}"
        assert repr(extra) in refused_by_verify(doubled(files, name, extra), tmp_path / "x"), extra


@pytest.mark.parametrize("start", ["biases", "version 1", "coded rest"])
def test_any_plain_tensor_of_a_layer(start: str, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """Two layers of one kind, and (GPT-OSS: sliding and full attention) two that are each the only one of theirs."""
    files = seeds[start].files
    assert verify(write_files(with_shards(files, lambda shard: None), tmp_path / "x"))
    plain = [name for name in tensors_of(files) if ".layers." in name and not is_resmoe_name(name)]
    assert len(plain) >= 15
    for name in plain:
        assert f"incomplete: there is no {name};" in refused_by_verify(dropped(files, name), tmp_path / "x")


def test_an_index_that_names_more_than_there_is(seeds: dict[str, Seed], tmp_path: Path) -> None:
    files = dict(seeds["shards"].files)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["gone"] = "model-00001-of-00003.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    folder = write_files(files, tmp_path / "x")
    for act in LOADERS.values():
        with pytest.raises(CheckpointError, match=r"1 tensors of model\.safetensors\.index\.json are not in .*'gone'"):
            act(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}], ids=str)
def test_an_index_that_names_nothing(index: Any, seeds: dict[str, Seed], tmp_path: Path) -> None:
    """vLLM and transformers find no weights by it, and say so in words of their own."""
    folder = write_files({**seeds["shards"].files, INDEX_NAME: json.dumps(index).encode()}, tmp_path / "x")
    for act in LOADERS.values():
        with pytest.raises(CheckpointError, match=rf"x/{re.escape(INDEX_NAME)}: no weight_map; expected one from tens"):
            act(folder)


def test_sizes_that_the_config_says_twice(seeds: dict[str, Seed], tmp_path: Path) -> None:
    """A loader builds the model by the rest of config.json, and experts by the block."""
    files = with_config(seeds["version 1"].files, lambda config: config.update(num_experts=5))
    with pytest.raises(FormatError, match=r"config\.json says .*num_experts=5, .* its quantization_config .*=4,"):
        verify(write_files(files, tmp_path / "x"))


def test_vllm_reads_no_pickles(seeds: dict[str, Seed], tmp_path: Path) -> None:
    files = {name: content for name, content in seeds["version 1"].files.items() if name.endswith(".json")}
    files["pytorch_model.bin"] = b"cposix\nsystem\n(S'true'\ntR."
    with pytest.raises(
        CheckpointError, match=r"x: no safetensors; a ResMoE checkpoint's weights are read from nothing else"
    ):
        loaders.by_vllm(write_files(files, tmp_path / "x"))
