"""A calibration in use: coders and planner, by laws on what is written."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress_tools.cli.request import read_request
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.importance import CalibrationFile
from compress_tools.pipeline import compress
from compress_tools.planner.budget import plan_for_budget
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.counted import open_calibration
from compress_tools.planner.planner import find_plan
from compress_tools.source.design_matrix import expert_to_rows
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.checkpoint import ResMoECheckpoint

# Everything measured, nothing from a sample: errors are those of the written checkpoint.
WHOLE = {"measure_experts": 0, "measure_rows": 0}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def counted_errors(source: Path, stored: Path, calibration: Path) -> dict[int, float]:
    """By layer, what a checkpoint without centers loses of what counts, as a share of all that counts."""
    original, checkpoint, file = (
        open_source(SourceReader(source)),
        ResMoECheckpoint(stored),
        CalibrationFile(calibration),
    )
    found = {}
    for layer in original.layers:
        importance = file.layer(layer, original.projections, original.sizes)
        lost = energy = 0.0
        for expert in range(original.sizes.num_experts):
            own = importance.expert(expert)
            rows = expert_to_rows(original.read_expert(layer, expert))
            restored = checkpoint.expert(layer, expert)
            for projection in original.projections:
                lost += float(own.weighed(projection, rows[projection] - restored[projection]).square().sum())
                energy += float(own.weighed(projection, rows[projection].float()).square().sum())
        found[layer] = lost / energy
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_less_is_lost_of_what_counts(bits: int, made: Path, trained: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"method": "trellis", "bits": bits, "center": "none"}
    for name, given, workers in (("with", str(made), 1), ("twice", str(made), 2), ("without", None, 1)):
        compress(trained[0], tmp_path / name, make_config(**options, calibration=given, workers=workers))
    assert contents(tmp_path / "with") == contents(tmp_path / "twice")
    found = {name: counted_errors(trained[0], tmp_path / name, made) for name in ("with", "without")}
    assert all(found["with"][layer] < error for layer, error in found["without"].items())


def test_the_plan_foresees_what_is_written(made: Path, trained: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"coders": "trellis,quantize", "calibration": str(made), "target_bytes_ratio": 0.1, **WHOLE}
    config = make_config(center="none", calibration=str(made))
    plan = plan_for_budget(trained[0], config, make_planner_config(**options))
    compress(trained[0], tmp_path / "out", config, planned=plan)
    written = counted_errors(trained[0], tmp_path / "out", made)
    assert plan.found is not None
    for layer, planned in plan.found.layers.items():
        assert planned.error == pytest.approx(written[layer], rel=1e-4)


@pytest.mark.parametrize("ratio", [0.08, 0.09, 0.11])  # of fp32
def test_by_the_coefficients_no_other_plan_is_better(ratio: float, made: Path, trained: tuple[Path, Path]) -> None:
    """The plan that goes by coefficients is never above the one that goes without, counted by the coefficients."""
    tensors = load_file(made)
    with safe_open(made, framework="pt") as file:
        metadata = file.metadata()
    layers = [name for name in tensors if name.endswith(".coefficient")]
    for number, name in enumerate(layers):
        tensors[name] = torch.tensor(0.01 * 8.0**number)  # far apart, so that they change the choice
    spread, bare = made.with_name("spread"), made.with_name("bare")
    save_file(tensors, spread, metadata)
    save_file({name: tensor for name, tensor in tensors.items() if name not in layers}, bare, metadata)
    reader, config, plans = SourceReader(trained[0]), make_config(center="none"), {}
    for file_used in (spread, bare):
        request = make_planner_config(
            target_bytes_ratio=ratio, optimize="output", coders="trellis", calibration=str(file_used), **WHOLE
        )
        plans[file_used] = find_plan(reader, config, request)
    source = open_source(reader)
    assert source.layers == (0, 1)
    # One coding for both: a unit is relative to the output under `bare`, KL under `spread`; the ratio is the layer's.
    same = find_plan(
        reader,
        config,
        make_planner_config(
            target_bytes_ratio=0.999,
            optimize="output",
            coders="trellis",
            uniform=True,
            calibration=str(spread),
            **WHOLE,
        ),
    )
    relative = find_plan(
        reader,
        config,
        make_planner_config(
            target_bytes_ratio=0.999, optimize="output", coders="trellis", uniform=True, calibration=str(bare), **WHOLE
        ),
    )
    units = {layer: same.layers[layer].error / relative.layers[layer].error for layer in source.layers}
    by_coefficients = {
        name: sum(units[layer] ** (name == bare) * own.error for layer, own in plan.layers.items())
        for name, plan in plans.items()
    }
    assert by_coefficients[spread] < by_coefficients[bare]
    assert plans[spread].layers[1].nbytes > plans[spread].layers[0].nbytes


def test_which_requests_take_it(made: Path, trained: tuple[Path, Path], tiny_olmoe: Path, tmp_path: Path) -> None:
    given = {"calibration": str(made)}
    for more in ({}, {"target_bytes_ratio": 0.2}, {"method": "trellis"}, {"optimize": "output"}):
        request = read_request({**given, **more}, None)
        assert request.config.calibration == str(made)
        assert (request.budget is None) == ("method" in more)
    inputs = tmp_path / "inputs.safetensors"
    save_file({"layer.0": torch.ones(2, 64)}, inputs)
    request = read_request({"calibration": str(inputs), "optimize": "output"}, None)
    assert request.config.calibration is None
    with pytest.raises(ConfigError, match="add --optimize output"):
        read_request({"calibration": str(inputs)}, None)
    config = make_config(method="trellis", bits=2, calibration=str(inputs))
    with pytest.raises(CheckpointError, match="is not of `resmoe calibrate`"):
        compress(trained[0], tmp_path / "out", config)
    with pytest.raises(CheckpointError, match="was made from other weights than this source's"):
        compress(tiny_olmoe, tmp_path / "out", make_config(method="trellis", bits=2, calibration=str(made)))
    with pytest.raises(CheckpointError, match="was made from other weights than this source's"):
        request_of = make_planner_config(target_bytes_ratio=0.2, calibration=str(made))
        open_calibration(request_of, open_source(SourceReader(tiny_olmoe)), [0])


def test_the_recipe_knows_its_content(made: Path, trained: tuple[Path, Path], tmp_path: Path) -> None:
    """A run with another calibration, or none, is another run."""
    options = {"method": "trellis", "bits": 2, "center": "none"}
    compress(trained[0], tmp_path / "out", make_config(**options, calibration=str(made)))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(made.read_bytes())
    compress(trained[0], tmp_path / "out", make_config(**options, calibration=str(copy)), resume=True)
    assert CalibrationFile(made).digest() in (tmp_path / "out" / "resmoe_recipe.json").read_text()
    assert CalibrationFile(made).digest() in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="recipe"):
        compress(trained[0], tmp_path / "out", make_config(**options), resume=True)


def test_with_a_calibration_the_menu_is_codes_unless_others_are_named(made: Path, trained: tuple[Path, Path]) -> None:
    """What pruning leaves out is foreseen too low."""
    for coders, pruned in (("all", False), ("prune", True)):
        asked = make_planner_config(target_bytes_ratio=0.2, coders=coders, calibration=str(made), **WHOLE)
        planned = plan_for_budget(trained[0], make_config(calibration=str(made), workers=1), asked)
        assert ("method: bitmap" in planned.text) == pruned
        assert ("method: trellis" in planned.text) != pruned
