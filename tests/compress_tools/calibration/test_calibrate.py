"""`resmoe calibrate`: what is in the file, by law; and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.architectures.experts import MoESizes
from compress_tools.calibration.calibrate import calibrate
from compress_tools.calibration.config import make_calibration_config
from compress_tools.calibration.noise import NOISE, add_noise, mean_kl
from compress_tools.cli.commands import cli
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.hf.dense_experts import expert_of
from compress_tools.importance import LEAST_ROUTING, PRIOR_TOKENS, CalibrationFile, is_calibration
from compress_tools.source.source_reader import SourceReader
from tests.compress_tools.calibration.test_statistics import opened

GATED = ("gate_proj", "up_proj", "down_proj")


def test_holds_every_layer_and_belongs_to_its_source(made: Path, trained: tuple[Path, Path], tiny_olmoe: Path) -> None:
    sizes = SourceReader(trained[0]).config
    shape = MoESizes(sizes["num_local_experts"], sizes["hidden_size"], sizes["intermediate_size"])
    found = CalibrationFile(made)
    found.check_source(SourceReader(trained[0]).fingerprint())
    assert found.metadata["tokens"] == 1984  # 64 windows of 31 tokens
    for layer in range(sizes["num_hidden_layers"]):
        own = found.layer(layer, GATED, shape)
        assert own.energy > 0
        assert own.coefficient is not None
        assert own.coefficient > 0
        assert all((rows > 0).all() for rows in own.rows.values())
        assert (own.columns > 0).all()
    with pytest.raises(CheckpointError, match="was made from other weights"):
        found.check_source(SourceReader(tiny_olmoe).fingerprint())
    with pytest.raises(CheckpointError, match=r"holds no 'layer\.99\.counts'"):
        found.layer(99, GATED, shape)
    with pytest.raises(CheckpointError, match=r"'layer\.0\.counts' has shape .*, expected \[7\]"):
        found.layer(0, GATED, MoESizes(7, 1, 1))


def test_coefficients_change_nothing_else(made: Path, trained: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    options = {"text": str(text), "max_tokens": 2000}
    for name in ("a", "b"):
        calibrate(trained[0], tmp_path / name, make_calibration_config(**options))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    alone, whole = load_file(tmp_path / "a"), load_file(made)
    assert {name for name in whole if name not in alone} == {
        f"layer.{layer}.coefficient" for layer in range(SourceReader(trained[0]).config["num_hidden_layers"])
    }
    for name, tensor in alone.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-7)


def test_what_few_tokens_say_is_drawn_towards_the_mean(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made)
    with safe_open(made, framework="pt") as file:
        metadata = file.metadata()
    experts, columns = tensors["layer.0.columns"].shape
    rows = tensors["layer.0.up_proj"].shape[1]
    tensors["layer.0.counts"][0], tensors["layer.0.routing"][0] = 0, 0
    tensors["layer.0.counts"][1] = PRIOR_TOKENS
    for name in ("columns", "output", *GATED):
        tensors[f"layer.0.{name}"][0] = 0
    save_file(tensors, tmp_path / "edited", metadata)
    own = CalibrationFile(tmp_path / "edited").layer(0, GATED, MoESizes(experts, columns, rows))
    routing = tensors["layer.0.routing"]
    mean = (routing / routing.sum()) @ tensors["layer.0.columns"]
    assert own.unrouted == (0,)
    torch.testing.assert_close(own.columns[0], mean)
    torch.testing.assert_close(own.columns[1], (tensors["layer.0.columns"][1] + mean) / 2)
    up = (routing / routing.sum()) @ tensors["layer.0.up_proj"]
    torch.testing.assert_close(own.rows["up_proj"][0], torch.full((rows,), LEAST_ROUTING * routing.mean() * up.mean()))


def test_self_generated_is_seeded(trained: tuple[Path, Path], tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = calibrate(trained[0], tmp_path / name, make_calibration_config(self_generated=100, seed=seed))
        assert done.tokens == 124  # 4 windows of 31 tokens
        found[name] = (tmp_path / name).read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_noise_has_the_size_that_it_says(tmp_path: Path) -> None:
    dense, source = opened("mixtral", tmp_path)
    before = [expert_of(dense, expert).up.clone() for expert in range(source.sizes.num_experts)]
    add_noise(dense, source.projections, source.sizes.num_experts, 0, seed=0)
    for expert, old in enumerate(before):
        added = expert_of(dense, expert).up - old
        assert added.square().sum() / old.square().sum() == pytest.approx(NOISE, rel=0.1)
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert mean_kl(logits, logits) == pytest.approx(0, abs=1e-12)
    expected = torch.nn.functional.kl_div(
        logits[1:].log_softmax(-1), logits[:1].log_softmax(-1), log_target=True, reduction="sum"
    )
    assert mean_kl(logits[:1], logits[1:]) == pytest.approx(float(expected) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give one of --text FILE and --self-generated N"),
        ({"text": "x", "self_generated": 10}, "give one of --text FILE and --self-generated N"),
        ({"self_generated": 10, "max_tokens": 5}, "--max-tokens has no effect with --self-generated"),
        ({"text": "x", "coefficients": True, "dtype": "bfloat16"}, "rounds away"),
    ],
)
def test_refused_requests(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_calibration_config(**options)


def test_refused_files(made: Path, trained: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    config = make_calibration_config(text=str(text), max_tokens=100)
    with pytest.raises(ConfigError, match="exists; choose another name or pass --overwrite"):
        calibrate(trained[0], made, config)
    assert is_calibration(made)
    assert not is_calibration(text)
    with pytest.raises(CheckpointError, match="not readable"):
        CalibrationFile(text)
    weights = next(trained[0].glob("*.safetensors"))
    assert not is_calibration(weights)
    with pytest.raises(CheckpointError, match="is not of `resmoe calibrate`"):
        CalibrationFile(weights)
    encoder = save_tiny_model("switch_transformers", tmp_path / "switch", torch.float32)
    with pytest.raises(Exception, match="encoder-decoder"):
        calibrate(encoder, tmp_path / "out", config)


def test_the_command(
    trained: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.safetensors"
    arguments = ["calibrate", str(trained[0]), "--out", str(out), "--text", str(text), "--max-tokens", "500"]
    cli.main(arguments, standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"Written to {out}: ")
    assert is_calibration(out)
