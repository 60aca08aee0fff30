"""What a unit of weight error counts: against a direct measurement, and by the laws of routing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.planner.config import make_planner_config
from compress_tools.planner.output_weights import (
    LEAST_ROUTING,
    RANDOM_INPUTS,
    Activation,
    LayerInputs,
    expert_effects,
    open_inputs,
    output_weights,
)
from compress_tools.planner.plan_text import plan_text
from compress_tools.planner.planner import find_plan
from compress_tools.source.layer_weights import LayerWeights
from compress_tools.source.moe_source import open_source
from compress_tools.source.reader import CheckpointReader
from tests.compress_tools.planner.test_planner import Told, expert_tensors, make_model

SILU = torch.nn.functional.silu
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("activation", "gated"),
    [(SILU, True), (torch.nn.functional.relu, False), (torch.tanh, False)],
    ids=["silu-gated", "relu-two-matrices", "tanh-two-matrices"],
)
def test_match_a_direct_measurement(activation: Activation, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    names = PROJECTIONS if gated else PROJECTIONS[1:]
    rows = {p: torch.randn(24, 32, generator=generator) / 6 for p in names}
    tokens = torch.randn(64, 32, generator=generator)

    def output(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        up = tokens @ weights["up_proj"].T
        inner = activation(tokens @ weights["gate_proj"].T) * up if gated else activation(up)
        return inner @ weights["down_proj"]

    effects, energy = expert_effects(rows, tokens, activation)
    torch.testing.assert_close(energy, output(rows).square().sum(1))
    assert set(effects) == set(rows)
    for projection in rows:
        ratios = []
        for _ in range(200):
            error = 1e-3 * torch.randn(24, 32, generator=generator)
            changed = output({**rows, projection: rows[projection] + error}) - output(rows)
            ratios.append(changed.square().sum() / error.square().sum())
        measured_effect = torch.stack(ratios).mean()
        assert float(effects[projection].sum()) == pytest.approx(float(measured_effect), rel=0.05), projection


@pytest.mark.parametrize("name", ["silu", "swish", "relu", "gelu", "gelu_new"])
def test_activations_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = make_model("random", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": name}))
    request = make_planner_config(target_bytes_ratio=0.3, optimize="output")
    inputs = open_inputs(request, open_source(CheckpointReader(path)), seed=3)
    assert inputs is not None
    values = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(inputs.activation(values), ACT2FN[name](values))
    tokens, routing = inputs.of(0)
    assert tokens.shape == (RANDOM_INPUTS, 64)
    assert tokens.std() == pytest.approx(1, abs=0.03)
    assert torch.equal(routing, torch.ones(RANDOM_INPUTS, 4))


def test_experts_with_biases_are_refused(tmp_path: Path) -> None:
    path = save_tiny_model("gpt_oss", tmp_path / "m", torch.bfloat16, save_original_format=False)
    request = make_planner_config(target_bytes_ratio=0.3, optimize="output")
    with pytest.raises(ConfigError, match="have biases or an activation"):
        open_inputs(request, open_source(CheckpointReader(path)), 0)


def test_bytes_follow_the_effect(tmp_path: Path) -> None:
    path = tmp_path / "scaled"
    make_model("random", path)
    tensors = load_file(path / "model.safetensors")
    for name in expert_tensors(tensors, 0, "w2"):
        tensors[name] *= 0.03  # hardly any of the weights' energy, all of the output's
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def down_bits(**options: object) -> int:
        request = make_planner_config(target_bytes_ratio=0.2, coders="quantize", **options)
        found = find_plan(CheckpointReader(path), make_config(workers=1, center="none"), request)
        return {p: part.bits for part in found.layers[0].spec.residual for p in part.projections}["down_proj"]

    assert down_bits() < down_bits(optimize="output")


def weights_of(path: Path, routing: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Of 4 seeded experts under 20 seeded inputs with this routing ``[20, 4]``."""
    generator = torch.Generator().manual_seed(1)
    inputs, design = torch.randn(20, 64, generator=generator), torch.randn(4, 32, 192, generator=generator)
    save_file({"layer.1": inputs, "layer.1.routing": routing.contiguous()}, path)
    return output_weights(LayerWeights(design, [{}] * 4), PROJECTIONS, LayerInputs(SILU, 64, 4, 0, path), 1)


def test_half_the_router_weight_is_a_quarter_of_the_effect(tmp_path: Path) -> None:
    routing = torch.rand(20, 4, generator=torch.Generator().manual_seed(2))
    halved = routing.clone()
    halved[:, 1] /= 2
    (before, unrouted), (after, _) = (weights_of(tmp_path / "inputs.safetensors", own) for own in (routing, halved))
    assert unrouted == ()
    torch.testing.assert_close(after[1] / after[0], 0.25 * before[1] / before[0])
    torch.testing.assert_close(after[2] / after[0], before[2] / before[0])


def test_no_expert_is_free(tmp_path: Path) -> None:
    """An expert that the calibration does not reach counts as if it had a small part in every token."""
    only_first = torch.eye(4)[torch.zeros(20, dtype=torch.long)]
    (found, unrouted) = weights_of(tmp_path / "inputs.safetensors", only_first)
    assert unrouted == (1, 2, 3)
    assert found.min() > 0
    a_little = only_first.clone()
    a_little[:, 1:] = (LEAST_ROUTING / 4) ** 0.5 * 1.01  # just above: counted as it is
    (expected, none) = weights_of(tmp_path / "inputs.safetensors", a_little)
    assert none == ()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_calibration(tmp_path: Path) -> None:
    path = make_model("random", tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    inputs = {f"layer.{layer}": torch.randn(20, 64, generator=generator) for layer in (0, 1)}
    inputs["layer.1.routing"] = torch.eye(4)[torch.arange(20) % 3]
    calibration = tmp_path / "inputs.safetensors"
    save_file(inputs, calibration)
    options = {"coders": "quantize", "optimize": "output", "calibration": str(calibration)}
    request, told = make_planner_config(target_bytes_ratio=0.25, **options), Told()
    found = find_plan(CheckpointReader(path), make_config(workers=1), request, told)
    assert found.error > 0
    assert found.unrouted == {1: (3,)}
    sentence = "the calibration routes next to nothing to experts 3;"
    assert sum(sentence in line for line in told.lines) == 1
    assert f"# Layer 1: {sentence}" in plan_text(found, make_config(), request, "source", "")
    given = LayerInputs(SILU, 64, 4, 0, calibration)
    with pytest.raises(CheckpointError, match=r"can't read 'layer\.7'"):
        given.of(7)
    with pytest.raises(CheckpointError, match=r"expected \[N, 65\]"):
        LayerInputs(SILU, 65, 4, 0, calibration).of(0)
    # A draft need not be in it, but counts where it is.
    drafting = LayerInputs(SILU, 64, 4, 0, calibration, frozenset({1, 7}))
    for own, gaussian in zip(drafting.of(7), LayerInputs(SILU, 64, 4, 0, None).of(7), strict=True):
        assert torch.equal(own, gaussian)
    assert torch.equal(drafting.of(1)[0], inputs["layer.1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.0": torch.ones(3, 64).index_fill(1, torch.tensor(5), torch.inf)}, "'layer.0' is not finite"),
        ({"layer.0": torch.ones(0, 64)}, "expected [N, 64]"),
        ({"layer.0.routing": torch.ones(4, 4)}, "layer.0.routing has 4 rows, layer.0 3"),
        ({"layer.0.routing": torch.ones(3, 5)}, "expected [N, 4]"),
        ({"layer.0.routing": torch.zeros(3, 4)}, "layer 0: the experts' outputs are all zero"),
    ],
    ids=["inf", "empty", "other-rows", "other-experts", "nothing-routed"],
)
def test_refusals(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "inputs.safetensors"
    save_file({"layer.0": torch.ones(3, 64), "layer.0.routing": torch.ones(3, 4), **change}, path)
    with pytest.raises(CheckpointError) as caught:
        output_weights(
            LayerWeights(torch.ones(4, 32, 192), [{}] * 4), PROJECTIONS, LayerInputs(SILU, 64, 4, 0, path), 0
        )
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
