"""A probe's laws: what it must say of experts whose relation is known, and that it says so to people and scripts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.center.barycenter import barycenter, identity_perm
from compress_tools.cli.commands import cli
from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.numerics.clock import StageClock
from compress_tools.numerics.sampling import spaced
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.planner.candidates import CenterBits, Coder, Sizes
from compress_tools.planner.config import MENU_METHODS
from compress_tools.planner.measure import Sample, measure_layer
from compress_tools.probe.config import make_probe_config
from compress_tools.probe.energy import SHARES, magnitude_curve, spectrum_curve
from compress_tools.probe.predictions import (
    AlignedSample,
    Candidate,
    candidates_for,
    mean_correction,
    predict,
    relative_errors,
)
from compress_tools.probe.probe import CENTER, probe
from compress_tools.probe.sample import nearest_rows
from compress_tools.probe.verdict import Prediction, judge
from compress_tools.progress.listener import Silent
from compress_tools.source.layer_weights import read_layer
from compress_tools.source.reader import CheckpointReader

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
    kinds = {(one.coder, one.center_bits) for one in found.predictions}
    assert {coder for coder, _ in kinds} == set(MENU_METHODS)
    assert {center for _, center in kinds} == {None, 4, 8, 16}
    for kind in kinds:
        line = [one for one in found.predictions if (one.coder, one.center_bits) == kind]
        errors = [one.error for one in sorted(line, key=lambda one: one.bytes_ratio)]
        assert errors == sorted(errors, reverse=True)
        assert all(one.used_ratio <= one.bytes_ratio * (1 + 1e-9) for one in line)


def aligned_sample(experts: int, rows: int = 48, hidden_size: int = 64) -> AlignedSample:
    """Seeded experts with something in common."""
    design = gaussian(rows, 3 * hidden_size) + 0.4 * gaussian(experts, rows, 3 * hidden_size, seed=1)
    return AlignedSample(design, barycenter(design, CENTER), PROJECTIONS)


WHOLE = Sample(0, 0, torch.bfloat16, seed=0, workers=1)
MIXED = {"hidden_size": 64, "intermediate_size": 48, "num_local_experts": 4, "num_hidden_layers": 1}
CANDIDATES = (
    *({"method": "quantize", "bits": bits} for bits in (2, 3, 4)),
    *({"method": "trellis", "bits": bits} for bits in (2, 4)),
    *({"method": "prune", "retain_ratio": 0.2, "value_bits": bits} for bits in (4, 8, 16)),
    {"method": "low-rank", "retain_ratio": 0.3, "factor_bits": 8},
    {"method": "low-rank+quantize", "retain_ratio": 0.1, "factor_bits": 8, "bits": 2},
)


@pytest.mark.parametrize("center_bits", [0, 4, 8, 16], ids=lambda bits: f"center{bits}")
def test_predictions_are_the_written_checkpoints_errors(center_bits: CenterBits, tmp_path: Path) -> None:
    """Whatever the probe predicts of all experts is what compressing with the same options writes."""
    source = save_tiny_model("mixtral", tmp_path / "m", torch.bfloat16, **MIXED)
    own = {"center": "none"} if not center_bits else {"center_bits": center_bits}
    own |= {"center_coder": "trellis"} if center_bits == 4 else {}
    limits = {"max_iterations": CENTER.max_iterations, "tolerance": CENTER.tolerance, "workers": 1}
    target = make_target(CheckpointReader(source), make_config())
    sizes, layer = Sizes(target.fmt), read_layer(target.source, 0, torch.bfloat16, "cpu", Silent(), StageClock())
    found = barycenter(layer.design, CENTER)
    if not center_bits:  # what compressing without a center does
        found = replace(found, perm=identity_perm(4, 48))
    for number, options in enumerate(CANDIDATES):
        joint = options["method"] in ("prune", "low-rank")
        coder = Coder(make_config(**options), joint=joint, centers=(center_bits,))
        candidate = Candidate(center_bits, coder, sizes.uniform(coder, center_bits))
        aligned = AlignedSample(layer.design, found, PROJECTIONS)
        (predicted,) = relative_errors(aligned, [candidate], WHOLE, 4).values()
        form = {} if joint or "low-rank" not in options["method"] else {"low_rank_form": "per-projection"}
        config = make_config(**options, **own, **limits, **form)
        report = compress(source, tmp_path / f"out{number}", config)
        assert report.expert_bytes_after == candidate.nbytes, options
        assert predicted == pytest.approx(report.layers[0].relative_error, rel=1e-3), options


def test_candidates_use_the_bytes_up_and_keep_within(random_model: Path) -> None:
    target = make_target(CheckpointReader(random_model), make_config())
    sizes, dense = Sizes(target.fmt), 8 * 3 * 48 * 128 * 4
    for ratio in (0.07, 0.2, 0.5):
        found = candidates_for(sizes, dense, [ratio])
        assert {"quantize", "prune"} <= {one.coder.config.method for one in found}
        assert len(set(found)) == len(found)
        for one in found:
            assert one.nbytes == sizes.uniform(one.coder, one.center_bits)
            assert one.nbytes <= ratio * dense * (1 + 1e-9)
            alike = [other.nbytes for other in found if other.kind == one.kind]
            assert one.nbytes >= 0.85 * max(alike)


def test_default_sizes_are_those_of_plain_quantisation(random_model: Path) -> None:
    """A code, and a scale of 2 bytes for each group of 128: of fp32 weights here."""
    found = probe(str(random_model), make_probe_config(max_layers=1, experts=2, workers=1))
    assert found.bytes_ratios == pytest.approx([(bits + 16 / 128) / 32 for bits in (2, 3, 4, 8)])
    plain = {one.bytes_ratio: one for one in found.predictions if (one.coder, one.center_bits) == ("quantize", None)}
    for bits, ratio in zip((2, 3, 4, 8), found.bytes_ratios, strict=True):
        assert plain[ratio].setting.startswith(f"{bits} bits")


def test_the_best_is_chosen_over_all_layers() -> None:
    """One coder for every layer: of least mean error, not each layer's own."""
    coders = [Coder(make_config(method="quantize", bits=bits), joint=False, centers=(0,)) for bits in (2, 3)]
    two, three = (Candidate(0, coder, nbytes) for coder, nbytes in zip(coders, (10, 12), strict=True))
    first, second = predict([{two: 0.1, three: 0.3}, {two: 0.9, three: 0.4}], [0.11, 0.12, 0.05], dense_bytes=100)
    assert [(one.bytes_ratio, one.used_ratio, one.error) for one in first] == [(0.11, 0.1, 0.1), (0.12, 0.12, 0.3)]
    assert [(one.bytes_ratio, one.used_ratio, one.error) for one in second] == [(0.11, 0.1, 0.9), (0.12, 0.12, 0.4)]


def test_a_centers_rounding_does_not_grow_with_the_experts() -> None:
    """Of 2 sampled experts of 8: what they don't share grows by 7/4, a center's rounding stays."""
    aligned = aligned_sample(2)
    for bits in (4, 16):
        coder = Coder(make_config(method="quantize", bits=4), joint=False, centers=(bits,))
        candidate = Candidate(bits, coder, 1)
        (of_two,) = relative_errors(aligned, [candidate], WHOLE, 2).values()
        (of_eight,) = relative_errors(aligned, [candidate], WHOLE, 8).values()
        measured = measure_layer(aligned.design, aligned.found, PROJECTIONS, [coder], WHOLE)
        residual = float(measured.residuals[bits].sum())
        own = aligned.found.objective[-1]
        assert of_eight / of_two == pytest.approx((7 / 4 * own + residual - own) / residual, rel=1e-6)
    assert residual == pytest.approx(own, rel=1e-3)  # 16 bits: next to no rounding
    coder = Coder(make_config(method="quantize", bits=4), joint=False, centers=(0,))
    plain = [relative_errors(aligned, [Candidate(0, coder, 1)], WHOLE, number) for number in (2, 8)]
    assert plain[0] == plain[1]  # no center: nothing is shared


def test_low_rank_of_a_thinned_sample_is_that_of_the_whole() -> None:
    """Rows and columns thinned alike: of unrelated weights the same share of the energy is lost."""
    design = gaussian(2, 384, 3 * 128)
    coder = Coder(make_config(method="low-rank", retain_ratio=0.3, factor_bits=8), joint=True, centers=(0,))
    candidate, found = Candidate(0, coder, 1), barycenter(design, CENTER)
    (whole,) = relative_errors(AlignedSample(design, found, PROJECTIONS), [candidate], WHOLE, 2).values()
    rows, columns = torch.arange(48), torch.cat([torch.arange(16) + 128 * number for number in range(3)])
    perm = torch.arange(48).expand(2, 48)
    part = AlignedSample(design[:, rows], replace(found, center=found.center[rows], perm=perm), PROJECTIONS)
    (thinned,) = relative_errors(part.thinned(columns), [candidate], WHOLE, 2).values()
    (rows_alone,) = relative_errors(part, [candidate], WHOLE, 2).values()
    assert thinned == pytest.approx(whole, rel=0.02)
    assert abs(rows_alone - whole) > 0.05 * whole


def test_energy_curves() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    for curve in (magnitude_curve(matrix.diagonal()), spectrum_curve(matrix)):
        assert curve[SHARES.index(0.25)] == pytest.approx(0.9)
        assert curve[SHARES.index(0.5)] == pytest.approx(1)
        assert curve[SHARES.index(0.1)] == pytest.approx(0.9 * 0.1 / 0.25)
    assert magnitude_curve(torch.zeros(2, 2)) == spectrum_curve(torch.zeros(2, 2)) == [1.0] * len(SHARES)


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
        Prediction("quantize", 8, 0.25, 0.25, "3 bits", with_center),
        Prediction("quantize", None, 0.25, 0.25, "4 bits", without),
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
