"""A probe's laws: what it must say of experts whose relation is known, and that it says so to people and scripts."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.cli.commands import cli
from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.format.codec import decode_residual
from compress_tools.numerics.sampling import spaced
from compress_tools.probe.coders import CODERS, LowRankCoder, PruneCoder, QuantiseCoder
from compress_tools.probe.config import make_probe_config
from compress_tools.probe.matrix import GROUP, MeasuredMatrix, quantise, quantised_bits
from compress_tools.probe.probe import probe
from compress_tools.probe.result import SHARES, mean_correction
from compress_tools.probe.sample import nearest_rows
from compress_tools.probe.verdict import Prediction, judge
from compress_tools.residuals.recipes import uniform_spec
from compress_tools.residuals.registry import encode_residual
from compress_tools.source.design_matrix import design_to_rows

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewrite(path: Path, change: Callable[[int, str, Tensor], Tensor]) -> Path:
    """Change every expert tensor of a one-shard Mixtral: (expert number, projection name, tensor) -> tensor."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name:
            expert, projection = name.split(".experts.")[1].split(".")[:2]
            tensors[name] = change(int(expert), projection, tensors[name]).clone(memory_format=torch.contiguous_format)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral with independent gaussian experts: 8 of I 48, H 128, 2 layers, fp32."""
    path = tmp_path_factory.mktemp("random") / "model"
    return save_tiny_model("mixtral", path, torch.float32, hidden_size=128, num_local_experts=8, num_hidden_layers=2)


@pytest.fixture
def equal_model(tmp_path: Path) -> Path:
    """Every expert is layer 0's first one."""
    path = save_tiny_model("mixtral", tmp_path / "equal", torch.bfloat16, num_local_experts=4)
    first = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if "0.block_sparse" in name}
    source = {name.split(".")[-2]: tensor for name, tensor in first.items() if ".experts.0." in name}
    return rewrite(path, lambda expert, projection, tensor: source[projection])


def test_equal_experts_share_everything(equal_model: Path) -> None:
    found = probe(str(equal_model), make_probe_config(workers=1))
    assert [layer.residual.before for layer in found.layers] == [0, 0, 0]
    assert [layer.residual.after for layer in found.layers] == [0, 0, 0]
    assert found.verdict.center_pays == "yes"
    assert found.verdict.shared == 1
    # What is left is the rounding of the center; with a bf16 center of bf16 experts, nothing.
    assert all(one.error == 0 for one in found.predictions if one.center_bits == 16)
    assert found.layers[0].spectrum["residual"] == [1.0] * len(SHARES)


def test_permuted_copies_are_equal_after_alignment(equal_model: Path) -> None:
    def permute(expert: int, projection: str, tensor: Tensor) -> Tensor:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(expert))
        return tensor[:, order] if projection == "w2" else tensor[order]

    found = probe(str(rewrite(equal_model, permute)), make_probe_config(max_layers=1, workers=1))
    (layer,) = found.layers
    assert layer.residual.before > 0.6
    assert layer.residual.after == 0
    assert found.verdict.center_pays == "yes"


@pytest.mark.parametrize("experts", [None, 3], ids=["all-8-experts", "3-of-8-experts"])
def test_independent_experts_are_like_the_control(random_model: Path, experts: int | None) -> None:
    found = probe(str(random_model), make_probe_config(experts=experts, max_layers=1, workers=1))
    number = experts or 8
    assert found.control.before == pytest.approx(1 - 1 / number, abs=0.005)
    for layer in found.layers:
        assert layer.residual.after == pytest.approx(found.control.after, rel=0.02)
    # Whatever the sample, the answer is for all 8: unrelated experts' mean takes 1/8.
    assert found.layers[0].residual.before * found.scale_to_all == pytest.approx(7 / 8, abs=0.005)
    assert found.verdict.center_pays == "no"
    assert "as unrelated as random matrices" in found.verdict.sentences[1]


def test_related_experts_pay_and_a_sample_agrees_with_the_whole(random_model: Path, tmp_path: Path) -> None:
    related = save_tiny_model(
        "mixtral", tmp_path / "m", torch.float32, hidden_size=128, num_local_experts=8, num_hidden_layers=1
    )
    common = {"w1": gaussian(48, 128, seed=1), "w3": gaussian(48, 128, seed=2), "w2": gaussian(128, 48, seed=3)}
    rewrite(related, lambda expert, projection, own: common[projection] + 0.3 * own / own.std())
    whole, part = (probe(str(related), make_probe_config(experts=number, workers=1)) for number in (8, 3))
    # 0.09 of own energy on 1 of common energy, of which a mean of 8 takes an eighth.
    assert whole.verdict.residual == pytest.approx(0.09 * 7 / 8 / 1.09, rel=0.02)
    assert part.verdict.residual == pytest.approx(whole.verdict.residual, rel=0.02)
    assert whole.verdict.center_pays in ("yes", "in part")
    errors = {(one.coder, one.center_bits, one.bytes_ratio): one.error for one in whole.predictions}
    for one in part.predictions:
        assert one.error == pytest.approx(errors[one.coder, one.center_bits, one.bytes_ratio], rel=0.05)


def test_curves_rise_to_one_and_errors_fall_with_bytes(random_model: Path) -> None:
    found = probe(str(random_model), make_probe_config(bytes_ratio=(0.2, 0.3, 0.4, 0.6), workers=1))
    for layer in found.layers:
        for curve in (*layer.spectrum.values(), *layer.magnitude.values()):
            assert len(curve) == len(SHARES)
            assert curve == sorted(curve)
            assert curve[0] >= SHARES[0]
            assert curve[-1] == pytest.approx(1)
        assert set(layer.spectrum) == {"residual", "weight", "random"}
    for coder in CODERS:
        for center in (None, *coder.center_bits):
            line = [one for one in found.predictions if (one.coder, one.center_bits) == (coder.name, center)]
            errors = [one.error for one in sorted(line, key=lambda one: one.bytes_ratio)]
            # Of few-bit values the smallest are better dropped than rounded to half a step: keeping all is no gain.
            slack = 1.1 if coder.name in ("pruned, 8-bit", "pruned, 4-bit") else 1
            assert all(later <= slack * earlier for earlier, later in pairwise(errors))
            assert all(one.used_ratio <= one.bytes_ratio * (1 + 1e-9) for one in line)


@pytest.mark.parametrize("shape", [(48, 192), (96, 48)], ids=["48x192", "96x48"])
def test_predictions_are_the_real_coders_errors(shape: tuple[int, int]) -> None:
    rows, columns = shape
    matrix = gaussian(rows, columns)
    hidden_size = columns // 3
    measured = MeasuredMatrix(matrix, hidden_size)
    bits = 6.0
    for method, predicted in (("low-rank", LowRankCoder()), ("prune", PruneCoder("pruned, bf16", 16, (16,)))):
        outcome = predicted.predict(measured, bits)
        assert outcome is not None
        # The mask's rows are padded to 64 bits; what is left of the 6 bits buys values or factors.
        mask_bits = 64 / hidden_size if method == "prune" else 0
        ratio = (bits - mask_bits) / 16
        spec = uniform_spec(
            make_config(method=method, retain_ratio=ratio, center="none"), PROJECTIONS, rows, hidden_size
        )
        stored = encode_residual(spec, matrix, torch.bfloat16, 0)
        decoded = decode_residual(spec, stored, hidden_size)
        split = design_to_rows(matrix, PROJECTIONS)
        lost = sum((decoded[name] - split[name]).double().square().sum().item() for name in PROJECTIONS)
        assert outcome.error == pytest.approx(lost / measured.energy, rel=1e-3)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert outcome.bits * matrix.numel() / 8 == pytest.approx(nbytes)


@pytest.mark.parametrize(("bits", "floor"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_quantising_a_gaussian_comes_near_lloyd_max(bits: int, floor: float) -> None:
    matrix = gaussian(256, 2 * GROUP)
    error = ((quantise(matrix, bits) - matrix).square().sum() / matrix.square().sum()).item()
    assert 0.95 * floor < error < 1.15 * floor
    for group in quantise(matrix, bits).view(-1, GROUP)[:50]:
        assert len(group.unique()) <= 2**bits


@pytest.mark.parametrize("columns", [100, 128, 200], ids=["short-group", "one-group", "group-and-rest"])
def test_quantising_keeps_shape_and_zeros(columns: int) -> None:
    matrix = gaussian(40, columns)
    matrix[3] = 0
    done = quantise(matrix, 8)
    assert done.shape == matrix.shape
    assert done[3].abs().sum() == 0
    torch.testing.assert_close(done, matrix, atol=0.03, rtol=0)


def test_bytes_of_plain_quantisation() -> None:
    assert quantised_bits(4, 128) == 4.125
    assert quantised_bits(4, 2048) == 4.125
    assert quantised_bits(4, 64) == 4.25
    outcome = QuantiseCoder().predict(MeasuredMatrix(gaussian(8, 384), 128), 4.125)
    assert outcome is not None
    assert outcome.setting == "4 bits"
    assert QuantiseCoder().predict(MeasuredMatrix(gaussian(8, 384), 128), 2) is None


def test_rows_are_found_among_all_rows_and_taken_once() -> None:
    candidates = gaussian(50, 64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    assert nearest_rows(3 * candidates[order], candidates).tolist() == order.tolist()
    twice = nearest_rows(candidates[[7, 7, 7]], candidates).tolist()
    assert 7 in twice
    assert len(set(twice)) == 3


def test_sampled_rows_find_permuted_copies(equal_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress_tools.probe.probe.MAX_WHOLE_ROWS", 32)
    monkeypatch.setattr("compress_tools.probe.probe.SAMPLED_ROWS", 24)

    def permute(expert: int, projection: str, tensor: Tensor) -> Tensor:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(expert))
        return tensor[:, order] if projection == "w2" else tensor[order]

    found = probe(str(rewrite(equal_model, permute)), make_probe_config(workers=1))
    assert found.rows == 24
    assert found.layers[0].residual.before > 0.6
    assert [layer.residual.after for layer in found.layers] == [0, 0, 0]


def test_sampled_rows_of_unrelated_experts_are_like_the_control(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress_tools.probe.probe.MAX_WHOLE_ROWS", 32)
    monkeypatch.setattr("compress_tools.probe.probe.SAMPLED_ROWS", 24)
    found = probe(str(random_model), make_probe_config(workers=1))
    assert found.layers[0].residual.after == pytest.approx(found.control.after, rel=0.02)
    assert found.verdict.center_pays == "no"


def test_mean_correction() -> None:
    assert mean_correction(8, 8) == 1
    assert mean_correction(2, 4) == 1.5


def test_spaced() -> None:
    assert spaced([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spaced([1, 2, 3, 4, 5], 1) == [3]
    assert spaced([4, 7], 3) == [4, 7]
    assert spaced([4], 2) == [4]


def predictions(with_center: float, without: float) -> list[Prediction]:
    return [
        Prediction("quantised", 8, 0.25, 0.25, "3 bits", with_center),
        Prediction("quantised", None, 0.25, 0.25, "4 bits", without),
    ]


@pytest.mark.parametrize(
    ("residual", "with_center", "without", "answer"),
    [
        (0.1, 0.0089, 0.01, "yes"),
        (0.1, 0.0091, 0.01, "no"),
        (0.83, 0.001, 0.01, "yes"),
        (0.84, 0.001, 0.01, "no"),
    ],
    ids=["error-under-0.9", "error-over-0.9", "shares-over-5%", "shares-under-5%"],
)
def test_rules_of_the_verdict(residual: float, with_center: float, without: float, answer: str) -> None:
    assert judge(residual, 0.875, [0.25], predictions(with_center, without)).center_pays == answer


def test_a_size_that_nothing_fits_in_is_said(random_model: Path) -> None:
    found = probe(str(random_model), make_probe_config(bytes_ratio=(0.001, 0.3, 0.3), max_layers=1, workers=1))
    assert [size.bytes_ratio for size in found.verdict.sizes] == [0.001, 0.3]
    assert "with a center nothing fits; without nothing fits" in found.verdict.sentences[2]


FAMILIES = ["switch_transformers", "gpt_oss", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_layouts(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path / family, torch.bfloat16, save_original_format=family != "qwen3_moe")
    found = probe(str(path), make_probe_config(max_layers=2, workers=1))
    assert found.shape[1] == (2 if family == "switch_transformers" else 3) * 64
    assert len(found.layers) == 2
    assert found.verdict.center_pays == "no"


def test_json_is_valid_and_the_same_again(random_model: Path, tmp_path: Path) -> None:
    words = ["probe", str(random_model), "--experts", "4", "--max-layers", "1", "--seed", "5", "--json"]
    picture = tmp_path / "probe.png"
    first = CliRunner().invoke(cli, [*words, "--picture", str(picture)], catch_exceptions=False)
    again = CliRunner().invoke(cli, [*words, "--workers", "2"], catch_exceptions=False)
    assert first.stdout == again.stdout
    content = json.loads(first.stdout)
    assert content["verdict"]["center_pays"] == "no"
    assert len(content["experts"]) == 4
    assert content["num_experts"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    other = CliRunner().invoke(cli, [*words, "--seed", "6"], catch_exceptions=False)
    assert json.loads(other.stdout)["experts"] != content["experts"]


def test_people_are_told_what_was_sampled(random_model: Path) -> None:
    told = CliRunner().invoke(cli, ["probe", str(random_model), "--experts", "4"], catch_exceptions=False).stdout
    assert "a sample: 2 layers (0, 1) of 2, 4 of 8 experts, all rows" in told
    assert "extrapolated from 4" in told
    assert "Does a center pay? no" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layers", "9"], "MoE layers are 0-1"),
        (["--experts", "9"], "ask for 2 to 8"),
        (["--experts", "1"], "greater than or equal to 2"),
        (["--max-layers", "0"], "--max-layers"),
        (["--bytes-ratio", "25"], "--bytes-ratio: Input should be less than 1, found 25"),
        (["--device", "banana"], "--device banana"),
        (["--seed", "-1"], "--seed"),
        (["--picture", "a.jpg"], "end the name in .png"),
        (["--picture", "/no/such/a.png"], "no directory /no/such"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_refusals(random_model: Path, words: list[str], sentence: str) -> None:
    outcome = CliRunner().invoke(cli, ["probe", str(random_model), *words])
    assert isinstance(outcome.exception, ConfigError)
    assert sentence in str(outcome.exception)
    assert outcome.stdout == ""


def test_a_single_expert_has_nothing_to_share(tmp_path: Path) -> None:
    path = save_tiny_model("mixtral", tmp_path / "one", torch.bfloat16, num_local_experts=1, num_experts_per_tok=1)
    with pytest.raises(ConfigError, match="nothing to share"):
        probe(str(path), make_probe_config())
