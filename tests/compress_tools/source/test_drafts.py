"""Multi-token-prediction layers: found by their names, compressed and restored like the others, or left out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.models.tiny_drafts import FILE, add_draft
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools import register_with_transformers
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError, FormatError
from compress_tools.format.schema import parse_format
from compress_tools.pipeline import compress
from compress_tools.source.layer_selection import select_layers
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from tests.compress_tools.stored.edits import forget_digests

# family, experts of the draft stacked, MoE layers, the draft's place in the checkpoint
KINDS = {
    "behind the decoder": ("glm4_moe", False, (1, 2, 3), "model.layers.3."),
    "below mtp": ("qwen3_next", False, (0, 1, 2, 3, 4), "mtp.layers.0."),
    "below mtp, stacked": ("qwen3_next", True, (0, 1, 2, 3, 4), "mtp.layers.0."),
}


def tiny(folder: Path, family: str, *, stacked: bool = False) -> Path:
    changes = {"layer_types": ["full_attention"] * 4} if family == "qwen3_next" else {}
    return add_draft(save_tiny_model(family, folder, torch.float32, **changes), family, stacked=stacked)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in sorted(folder.glob("*.safetensors")) for name, own in load_file(file).items()}


def change(folder: Path, apply) -> None:
    tensors = load_file(folder / FILE)
    apply(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_goes_the_whole_way(kind: str, tmp_path: Path) -> None:
    family, stacked, layers, place = KINDS[kind]
    source = tiny(tmp_path / "source", family, stacked=stacked)
    assert open_source(CheckpointReader(source)).layers == layers

    compress(source, tmp_path / "small", make_config(method="prune"))
    block = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    fmt = parse_format(block)
    assert (fmt.format_version, tuple(fmt.layers), fmt.decoder_layers) == (3, layers, layers[:-1])
    assert fmt.names.drafts == {layers[-1]: f"{place}mlp.experts.{{expert}}"}
    names = set(tensors_of(tmp_path / "small"))
    assert f"{place}mlp.experts.0.gate_proj.resmoe_center" in names
    assert not [name for name in names if "mlp.experts." in name and ".resmoe_" not in name]

    verdicts = verify(tmp_path / "small", source)
    assert [verdict.layer for verdict in verdicts] == list(layers)
    assert 0 < verdicts[-1].relative_error < 1

    restore(tmp_path / "small", tmp_path / "dense")
    before, after = tensors_of(source), tensors_of(tmp_path / "dense")
    if not stacked:  # what was stacked comes back one by one, as the family usually is
        assert {name: own.shape for name, own in after.items()} == {name: own.shape for name, own in before.items()}
    open_source(CheckpointReader(tmp_path / "dense"))
    assert all(torch.equal(own, before[name]) for name, own in after.items() if "mlp.experts." not in name)


@pytest.mark.parametrize(("count", "named"), [(3, False), (4, True)], ids=["draft not named", "decoder grown over it"])
def test_a_block_that_says_other_layers_are_drafts_than_the_config_is_refused(
    count: int, named: bool, tmp_path: Path
) -> None:
    compress(tiny(tmp_path / "source", "glm4_moe"), tmp_path / "small", make_config(method="prune"))
    forget_digests(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["num_hidden_layers"] = count
    if not named:
        del config["quantization_config"]["names"]["drafts"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"by config.json, which has {count} layers, layer 3 is "):
        verify(tmp_path / "small")


def test_exact_codes_restore_a_draft_exactly(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "qwen3_next")
    compress(source, tmp_path / "small", make_config(method="prune", retain_ratio=1.0, center="none"))
    restore(tmp_path / "small", tmp_path / "dense")
    before, after = tensors_of(source), tensors_of(tmp_path / "dense")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], own) for name, own in before.items())


@pytest.mark.parametrize("selection", ["decoder", "0-3"])
def test_layers_can_leave_a_draft_as_it_is(selection: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "qwen3_next")
    compress(source, tmp_path / "small", make_config(method="prune", layers=selection))
    fmt = parse_format(json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"])
    assert (fmt.format_version, fmt.names.drafts, tuple(fmt.layers)) == (2, None, (0, 1, 2, 3))
    before, after = tensors_of(source), tensors_of(tmp_path / "small")
    drafts = [name for name in before if name.startswith("mtp.")]
    assert drafts
    assert all(torch.equal(after[name], before[name]) for name in drafts)
    verify(tmp_path / "small", source)


def test_selections_count_the_decoder() -> None:
    layers, drafts = [1, 2, 3, 4], (4,)
    expected = {"all": layers, "decoder": [1, 2, 3], "top:2": [2, 3], "bottom:1": [1], "2-4": [2, 3, 4], "4": [4]}
    assert {text: select_layers(text, layers, drafts) for text in expected} == expected
    with pytest.raises(ConfigError, match="the model has 3 MoE layers"):
        select_layers("top:4", layers, drafts)


def test_a_draft_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "qwen3_next")
    change(source, lambda tensors: tensors.pop("mtp.layers.0.mlp.experts.2.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layer 4: not all 6 experts.*mtp.layers.0.mlp.experts.2.down_proj"):
        open_source(CheckpointReader(source))


def test_a_draft_of_other_sizes_stays_as_it_is(tmp_path: Path) -> None:
    def fewer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.layers.0.mlp.experts.5.")]:
            del tensors[name]

    source = tiny(tmp_path / "source", "qwen3_next")
    change(source, fewer)
    found = open_source(CheckpointReader(source))
    assert (found.layers, found.other_drafts) == ((0, 1, 2, 3), ("mtp.layers.0.mlp.experts",))
    assert any("mtp.layers.0.mlp.experts: experts for multi-token prediction," in text for text in found.remarks())


def test_remarks_name_the_drafts(tmp_path: Path) -> None:
    (text,) = open_source(CheckpointReader(tiny(tmp_path / "source", "glm4_moe"))).remarks()
    assert text.startswith("for multi-token prediction: layer 3;")


def test_transformers_loads_the_decoder_alone(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "glm4_moe")
    compress(source, tmp_path / "small", make_config(method="prune"))
    restore(tmp_path / "small", tmp_path / "dense")
    register_with_transformers()
    tokens = torch.arange(5, 17)[None]
    found, twin = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits
        for name in ("small", "dense")
    )
    assert (found - twin).abs().max() < 1e-4


def test_the_format_refuses_drafts_that_it_can_not_mean(tmp_path: Path) -> None:
    compress(tiny(tmp_path / "source", "glm4_moe"), tmp_path / "small", make_config(method="prune"))
    block = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    cases = {
        "names.drafts needs format_version 3, this is 2": {"format_version": 2},
        r"names.drafts: \[7\] are not in layers": {"names": {**block["names"], "drafts": {"7": "mtp.0.{expert}"}}},
        "expected a name with the layer's number": {"names": {**block["names"], "drafts": {"3": "mtp.{expert}"}}},
    }
    for message, own in cases.items():
        with pytest.raises(FormatError, match=message):
            parse_format({**block, **own})
