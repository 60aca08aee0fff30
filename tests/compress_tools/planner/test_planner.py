"""The planner's law: at every budget at or below the best single coder, on what is written; and the file between."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.cli.commands import main
from compress_tools.config import make_config
from compress_tools.errors import ConfigError
from compress_tools.format.schema import LayerSpec
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.candidates import Sizes
from compress_tools.planner.choices import expert_groups
from compress_tools.planner.config import make_planner_config, parse_size
from compress_tools.planner.plan_file import parse_plan
from compress_tools.planner.plan_text import plan_text
from compress_tools.planner.planner import Measured, choose, find_plan, measure
from compress_tools.planner.target_size import HEADER_BYTES
from compress_tools.progress.listener import Silent
from compress_tools.source.reader import CheckpointReader
from compress_tools.stored.verify import verify

KINDS = ("random", "near copies", "trained-like")
RATIOS = (0.15, 0.18, 0.2, 0.23, 0.25, 0.28, 0.3, 0.35, 0.4, 0.5, 0.7, 0.9)
SILU = torch.nn.functional.silu


def expert_tensors(tensors: dict[str, torch.Tensor], layer: int, projection: str) -> list[str]:
    """Names of one projection of a layer's experts, in their order."""
    return [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight" for expert in range(4)]


def make_model(kind: str, path: Path) -> Path:
    """Mixtral, 2 layers, 4 experts, H 64, I 32, bf16.

    near copies: of one expert, one layer's copies nearer than the other's, one expert farther than the rest.
    trained-like: row norms spread, a low-rank part shared by all, heavy tails.
    """
    save_tiny_model("mixtral", path, torch.bfloat16, num_hidden_layers=2, intermediate_size=32)
    if kind == "random":
        return path
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for layer, projection in itertools.product(range(2), ("w1", "w2", "w3")):
        names = expert_tensors(tensors, layer, projection)
        shared = tensors[names[0]].float()
        noise = 0.1 if layer == 0 else 0.4
        for expert, name in enumerate(names):
            fresh = torch.randn(shared.shape, generator=generator) * shared.std()
            if kind == "near copies":
                made = shared + fresh * noise * (3 if expert == 3 else 1)
            else:
                rows = torch.exp(0.7 * torch.randn(shared.shape[0], 1, generator=generator))
                factors = torch.randn(shared.shape[0], 2, generator=generator), torch.randn(2, shared.shape[1])
                made = shared + 0.6 * rows * fresh * fresh.abs() / shared.std() + 0.02 * factors[0] @ factors[1]
            tensors[name] = made.bfloat16().contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("planner")
    return {kind: make_model(kind, root / kind.replace(" ", "-")) for kind in KINDS}


def measured(path: Path, **options: object) -> Measured:
    """Everything measured, one worker."""
    reader, config = CheckpointReader(path), make_config(workers=1)
    base = make_target(reader, make_config(method="quantize"))
    return measure(base, config, make_planner_config(target_bytes_ratio=0.25, **options), Silent())


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def menu_of(models: dict[str, Path], kind: str) -> Measured:
    return measured(models[kind])


def test_never_above_the_best_single_coder_and_falling(menu_of: Measured) -> None:
    before = float("inf")
    total = sum(menu_of.dense.values())
    for ratio in RATIOS:
        found = choose(menu_of, make_planner_config(target_bytes_ratio=ratio))
        assert found.expert_bytes_after <= ratio * total
        assert found.error <= before
        before = found.error
        for key in next(iter(menu_of.layers.values())).uniform:
            own = [layer.uniform[key] for layer in menu_of.layers.values()]
            if sum(point.nbytes for point in own) <= ratio * total:
                assert found.error <= sum(point.error for point in own) / len(own) * (1 + 1e-12)


# What the command line offers as one coder for all layers.
SINGLE = (
    *({"method": "quantize", "bits": bits, "center": "none"} for bits in (2, 3, 4)),
    *({"method": "quantize", "bits": bits, "center_bits": 8} for bits in (2, 3)),
    {"method": "prune", "retain_ratio": 0.12, "value_bits": 4, "center_bits": 8},
    {"method": "prune", "retain_ratio": 0.1, "center": "none"},
    {"method": "low-rank", "retain_ratio": 0.15, "factor_bits": 8, "center_bits": 8},
)


@pytest.mark.parametrize("ratio", [0.22, 0.34])
def test_on_written_checkpoints(
    models: dict[str, Path], kind: str, menu_of: Measured, ratio: float, tmp_path: Path
) -> None:
    source, request = models[kind], make_planner_config(target_bytes_ratio=ratio)
    found = choose(menu_of, request)
    plan = parse_plan(plan_text(found, make_config(), request, "source", ""), "plan")
    report = compress(source, tmp_path / "planned", make_config(workers=1), planned=plan)
    assert report.expert_bytes_after <= ratio * report.expert_bytes_before
    errors = {verdict.layer: verdict.relative_error for verdict in verify(tmp_path / "planned", source)}
    mean = sum(errors.values()) / 2  # a layer left as it is has no error
    assert mean == pytest.approx(found.error, rel=1e-3)
    compared = 0
    for number, options in enumerate(SINGLE):
        single = compress(source, tmp_path / str(number), make_config(workers=1, **options))
        if single.expert_bytes_after <= ratio * single.expert_bytes_before:
            compared += 1
            assert mean <= sum(v.relative_error for v in verify(tmp_path / str(number), source)) / 2 * (1 + 1e-6)
    assert compared >= 3 if ratio > 0.3 else compared


def test_bytes_go_where_they_pay(models: dict[str, Path]) -> None:
    found = choose(measured(models["near copies"], coders="quantize"), make_planner_config(target_bytes_ratio=0.22))
    assert found.layers[0].nbytes < found.layers[1].nbytes
    assert any(layer.spec.center for layer in found.layers.values())
    grouped = [layer.spec for layer in found.layers.values() if layer.spec.groups]
    assert grouped
    for spec in grouped:
        assert (3,) in [group.experts for group in spec.groups]


def test_expert_groups() -> None:
    assert expert_groups(torch.tensor([1.0, 1.0, 9.0, 1.0]), 2) == ((0, 1, 3), (2,))
    assert expert_groups(torch.tensor([1.0, 1.01, 1.0, 1.02]), 2) == ((0, 1, 2, 3),)
    assert expert_groups(torch.tensor([1.0, 9.0]), 1) == ((0, 1),)
    assert expert_groups(torch.tensor([1.0]), 2) == ((0,),)


def test_the_budget_is_of_all_layers(models: dict[str, Path]) -> None:
    """``--layers 1``: layer 0 stays as it is, so layer 1 must make up for its bytes."""
    reader, config = CheckpointReader(models["random"]), make_config(workers=1, layers="1")
    request = make_planner_config(target_bytes_ratio=0.6, coders="quantize")
    found = find_plan(reader, config, request)
    before = found.layers[0].dense_bytes
    assert (found.layers[0].spec, found.layers[0].nbytes) == (None, before)
    assert found.expert_bytes_after <= 0.6 * found.expert_bytes_before
    assert 0.15 * before < found.layers[1].nbytes <= 0.2 * before
    assert found.error == found.layers[1].error / 2
    with pytest.raises(ConfigError, match="too small for what may be chosen"):
        find_plan(reader, config, make_planner_config(target_bytes_ratio=0.5, coders="quantize"))


class Told(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_how_long_is_said_before_and_after_the_first_layer(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, times = Told(), itertools.count(0, 100)
    monkeypatch.setattr("compress_tools.planner.planner.time.monotonic", lambda: float(next(times)))
    request = make_planner_config(target_bytes_ratio=0.3, coders="quantize")
    find_plan(CheckpointReader(models["random"]), make_config(workers=1, center="none"), request, told)
    assert len(told.lines) == 2
    assert re.fullmatch(
        r"planning: 2 layers, 8 candidates each: roughly 0:0\d, estimated from sizes with 1 workers?", told.lines[0]
    )
    assert told.lines[1] == "measuring layer 0 took 1:40; 1 more: about 1:40"


def test_a_sample_predicts_the_whole(models: dict[str, Path]) -> None:
    whole = measured(models["trained-like"], coders="quantize,low-rank")
    some = measured(models["trained-like"], coders="quantize,low-rank", measure_rows=16)
    assert whole.layers[0].exact
    assert not some.layers[0].exact
    for key, point in whole.layers[0].uniform.items():
        assert some.layers[0].uniform[key].nbytes == point.nbytes
        assert some.layers[0].uniform[key].error == pytest.approx(point.error, rel=0.15)


def test_bounds_uniform_and_too_small(models: dict[str, Path]) -> None:
    menu = measured(models["near copies"], coders="quantize")

    def ask(**options: object) -> list[float]:
        found = choose(menu, make_planner_config(**{"target_bytes_ratio": 0.3, **options}))
        return [layer.nbytes / layer.dense_bytes for layer in found.layers.values()]

    assert ask(layer_bytes_ratio="0:0.33..")[0] >= 0.33
    assert ask(layer_bytes_ratio="1:..0.25")[1] <= 0.25
    assert len(set(ask(uniform=True))) == 1
    with pytest.raises(ConfigError, match=r"smallest possible is (0[.][0-9]+)") as caught:
        ask(target_bytes_ratio=0.05)
    least = float(str(caught.value).rpartition(" ")[2])
    assert sum(ask(target_bytes_ratio=least)) / 2 <= least
    with pytest.raises(ConfigError, match="nothing that layer 1 could be stored as"):
        ask(layer_bytes_ratio="1:..0.01")
    with pytest.raises(ConfigError, match="no single coder keeps to"):
        ask(layer_bytes_ratio="1:..0.01", uniform=True)


def test_bytes_are_the_formats_own(models: dict[str, Path], menu_of: Measured) -> None:
    sizes = menu_of.sizes
    assert isinstance(sizes, Sizes)
    for (bits, coder), point in menu_of.layers[0].uniform.items():
        spec = point.pick.spec(sizes)
        made = make_target(CheckpointReader(models["random"]), make_config(), dict.fromkeys((0, 1), spec))
        assert made.expert_bytes_after == 2 * point.nbytes, (bits, coder.label)


class TestPlanFile:
    TEXT = """version: 1
center: barycenter
max_iterations: 25
tolerance: 1e-4
seed: 0
layers:
  0:
    center:
    - {method: quantized, projections: [gate_proj], bits: 8}
    groups:
    - experts: [0, 3]
      residual:
      - {method: bitmap, projections: [gate_proj, up_proj, down_proj], values_per_expert: 99}
    - experts: [1, 2]
      residual:
      - {method: quantized, projections: [gate_proj, up_proj, down_proj], bits: 2, group_size: 32}
  1: dense
"""

    def test_edited_by_hand_and_followed(self, models: dict[str, Path], tmp_path: Path) -> None:
        plan = parse_plan(self.TEXT, "plan.yaml")
        assert plan.recipe["tolerance"] == 1e-4
        assert plan.specs[1] is None
        report = compress(models["random"], tmp_path / "out", make_config(), planned=plan)
        assert [layer.layer for layer in report.layers] == [0]
        stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["layers"]["0"]
        assert LayerSpec.model_validate(stored) == plan.specs[0]
        for name in ("resmoe_recipe.json", "resmoe_report.json"):
            written = json.loads((tmp_path / "out" / name).read_text())["plan"]
            assert written["layers"]["1"] == "dense"
            assert LayerSpec.model_validate(written["layers"]["0"]) == plan.specs[0]
        assert (tmp_path / "out/resmoe_plan.yaml").read_text() == self.TEXT
        assert "--plan resmoe_plan.yaml" in (tmp_path / "out/README.md").read_text()

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("version: 1", "version: 7", "line 1: version: found 7, this version reads 1"),
            ("version: 1", "version: 0", "line 1: version: found 0, this version reads 1"),
            ("1: dense", "-1: dense", "line 17: layers.-1: expected a layer index"),
            ("1: dense", "true: dense", "line 17: layers.True: expected a layer index"),
            ("seed: 0\n", "", "line 1: seed is missing"),
            ("seed: 0", "seed: -1", "line 5: seed: Input should be greater than or equal to 0"),
            ("seed: 0", "sead: 0", "line 5: sead: unknown key"),
            ("bits: 2", "bits: 5", "line 16: layers.0.groups.1.residual.0.quantized.bits: Input should be 2, 3, 4"),
            ("bits: 2,", "", "bits: Field required"),
            ("bits: 2", "bitz: 2", "line 16: layers.0.groups.1.residual.0.quantized.bit"),
            ("experts: [1, 2]", "experts: [0, 2]", "line 7: layers.0: Value error, an expert is in two groups"),
            ("method: bitmap", "method: magic", "line 13: layers.0.groups.0.residual.0: Input tag 'magic'"),
            ("1: dense", "1: sparse", "line 17: layers.1: expected center and residual, or dense; found 'sparse'"),
            ("1: dense", "one: dense", "line 17: layers.one: expected a layer index"),
            ("1: dense", "0: dense", "line 17: layers.0: given twice"),
            ("1: dense", "1: [", "line 18: not YAML"),
        ],
    )  # fmt: skip
    def test_refusals_name_line_and_key(self, old: str, new: str, message: str) -> None:
        assert old in self.TEXT
        with pytest.raises(ConfigError) as caught:
            parse_plan(self.TEXT.replace(old, new), "plan.yaml")
        assert str(caught.value).startswith("plan.yaml: line ")
        assert message in str(caught.value)

    def test_layers_must_be_the_models(self, models: dict[str, Path], tmp_path: Path) -> None:
        for change, message in (
            ("", r"\[1\] are not listed"),
            ("  1: dense\n  2: dense\n", r"\[2\] have no experts"),
        ):
            plan = parse_plan(self.TEXT.replace("  1: dense\n", change), "plan.yaml")
            with pytest.raises(ConfigError, match=message):
                compress(models["random"], tmp_path / "out", make_config(), planned=plan)

    def test_round_trip(self, models: dict[str, Path], kind: str) -> None:
        request = make_planner_config(target_bytes_ratio=0.25, coders="quantize")
        config = make_config(workers=1)
        plan = plan_for_budget(models[kind], config, request)
        found = find_plan(CheckpointReader(models[kind]), config, request)
        assert plan.specs == {index: layer.spec for index, layer in found.layers.items()}
        assert yaml.safe_load(plan.text)["center"] == "barycenter"


def resmoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["resmoe", *map(str, words)])
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return (int(str(code or 0)), *capsys.readouterr())


def test_plan_then_compress_gives_equal_bytes(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = models["near copies"], ("--target-bytes-ratio", "0.25", "--coders", "quantize")
    for words in (
        ("plan", source, *wanted, "--out", tmp_path / "plan.yaml"),
        ("compress", source, tmp_path / "a" / "x", *wanted),
        ("compress", source, tmp_path / "b" / "x", "--plan", tmp_path / "plan.yaml"),
        ("compress", source, tmp_path / "c" / "x", "--plan", tmp_path / "plan.yaml", "--shard", "1/2"),
        ("compress", source, tmp_path / "c" / "x", "--plan", tmp_path / "plan.yaml", "--shard", "2/2"),
        ("merge", tmp_path / "c" / "x"),
    ):
        code, _, stderr = resmoe(capsys, monkeypatch, *words)
        assert code == 0, stderr
    first, *others = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "x").iterdir() if "timings" not in file.name}
        for name in "abc"
    )
    assert all(other == first for other in others)
    assert not (tmp_path / "a" / "x.plan.yaml").exists()


def test_a_resumed_run_measures_nothing(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("compress", models["random"], tmp_path / "x", "--target-bytes-ratio", "0.3", "--coders", "quantize")
    with monkeypatch.context() as broken:
        broken.setattr("compress_tools.pipeline.compress_layer", lambda *_: (_ for _ in ()).throw(ConfigError("stop")))
        assert resmoe(capsys, monkeypatch, *words)[0] == 2
    assert (tmp_path / "x.plan.yaml").exists()
    code, _, stderr = resmoe(capsys, monkeypatch, *words)
    assert code == 4
    assert "--resume" in stderr
    monkeypatch.setattr("compress_tools.planner.budget.find_plan", None)
    code, _, stderr = resmoe(capsys, monkeypatch, *words, "--resume")
    assert code == 0, stderr
    code, _, stderr = resmoe(capsys, monkeypatch, *words)
    assert (code, "not empty" in stderr) == (4, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target-bytes-ratio", "1.5"], "--target-bytes-ratio: Input should be less than 1"),
        (["--target-bytes-ratio", "much"], "'much' is not a valid float"),
        (["--target-bytes-ratio", "0.01"], "the smallest possible is 0."),
        (["--target-bytes-ratio", "0.3", "--method", "quantize"], "--method has no effect with --target-bytes-ratio"),
        (["--target-bytes-ratio", "0.3", "--bits", "4"], "--bits has no effect with --target-bytes-ratio"),
        (["--target-bytes-ratio", "0.3", "--coders", "magic"], "'magic' is none of trellis, quantize, prune"),
        (["--target-bytes-ratio", "0.3", "--optimize", "speed"], "'speed' is not one of 'error', 'output'"),
        (["--target-bytes-ratio", "0.3", "--calibration", "x"], "add --optimize output"),
        (["--target-bytes-ratio", "0.3", "--optimize", "output", "--calibration", "x"], "x: not readable"),
        (["--target-bytes-ratio", "0.3", "--layer-bytes-ratio", "0:1"], "expected LAYERS:LEAST..MOST"),
        (["--target-bytes-ratio", "0.3", "--layer-bytes-ratio", "9:0.."], "no experts in layers [9]"),
        (["--target-bytes-ratio", "0.3", "--shard", "1/2"], "resmoe plan SRC --target-bytes-ratio ... --out"),
        (["--shard", "1/2"], "`resmoe plan SRC --out plan.yaml`, then --plan plan.yaml with each slice"),
        (["--coders", "quantize", "--shard", "1/2"], "`resmoe plan SRC --out plan.yaml`, then"),
        (["--coders", "magic"], "'magic' is none of trellis, quantize, prune"),
        (["--target-bytes-ratio", "0.3", "--plan", "x"], "exclude each other"),
        (["--method", "prune", "--optimize", "output"], "--optimize has no effect with --method"),
        (["--method", "prune", "--uniform"], "--uniform has no effect with --method"),
        (["--plan", "nowhere.yaml"], "--plan nowhere.yaml: not readable"),
        (["--plan", "x", "--seed", "1"], "--seed has no effect with --plan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_refusals(
    words: list[str],
    sentence: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, stdout, stderr = resmoe(capsys, monkeypatch, "compress", models["random"], tmp_path / "new", *words)
    assert (code, stdout) == (4 if "not readable" in sentence and "plan" not in sentence else 2, ""), stderr
    assert sentence in stderr
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".log"]


def test_a_destination_that_cannot_be_written_is_known_before_measuring(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress_tools.planner.budget.find_plan", None)
    code, _, stderr = resmoe(capsys, monkeypatch, "compress", models["random"], "/proc/new")
    assert (code, stderr.count("\n")) == (4, 1)
    assert stderr.startswith("resmoe: /proc/new.plan.yaml: the plan can't be kept")
    code, _, stderr = resmoe(capsys, monkeypatch, "compress", models["random"], models["random"] / "inside")
    assert (code, "lie one inside the other" in stderr) == (2, True)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_target_size_is_kept(models, tmp_path: Path, share: float) -> None:
    """All weight files together, headers included, and little of the budget left over."""
    source = models["near copies"]
    target = make_target(CheckpointReader(source), make_config())
    headers = HEADER_BYTES * sum(len(shard.tensors) for shard in target.shards)
    size = int(share * target.expert_bytes_before) + target.other_bytes + headers
    planned = plan_for_budget(
        source, make_config(), make_planner_config(target_size=str(size), coders="quantize,trellis")
    )
    compress(source, tmp_path / "out", make_config(), planned=planned)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.85 * (size - target.other_bytes) < written - target.other_bytes <= size - target.other_bytes
    assert f"target_size {size}" in planned.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "16 apples"}, "--target-size '16 apples': expected a size such as 16GB, 16GiB or 800MB"),
        ({"target_size": "0GB"}, "expected a size such as"),
        ({"target_size": "1KB"}, "--target-size 1KB: all but the experts alone takes"),
        ({"target_size": "3TiB"}, "--target-size 3TiB: the model takes"),
        ({}, "expected either --target-bytes-ratio or --target-size"),
        ({"target_size": "1GB", "target_bytes_ratio": 0.5}, "expected either"),
    ],
)
def test_sizes_that_cannot_be(models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_for_budget(models["near copies"], make_config(), make_planner_config(**options))


def test_units_of_sizes() -> None:
    sizes = {"16GB": 16 * 10**9, "16 gib": 2**34, "1.5MB": 1_500_000, "12": 12, "7b": 7, "2t": 2 * 10**12, "1KiB": 1024}
    assert {text: parse_size(text) for text in sizes} == sizes
