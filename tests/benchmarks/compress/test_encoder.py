"""The encoder's rows: each path that the machine has, the target on the one that is taken, and a small layer."""

from benchmarks.compress.encoder import BITS, PATHS, TARGET_BITS, SearchPath, encoder_rows, layer_rows
from benchmarks.harness.shapes import MoEShape
from compress_tools.residuals.trellis import PASSES


def test_each_path_has_a_row_for_each_width() -> None:
    rows = encoder_rows(rows=1)
    paths = list(dict.fromkeys(row.context["path"] for row in rows))
    assert paths[-2:] == ["C++, 4 lanes", "torch"]
    assert [(row.context["path"], row.context["bits"]) for row in rows] == [
        (path, bits) for path in paths for bits in BITS
    ]
    assert all(row.value > 0 and row.context["passes"] == PASSES for row in rows)
    held = [(row.context["path"], row.context["bits"]) for row in rows if row.target is not None]
    assert held == [(paths[0], bits) for bits in BITS if bits in TARGET_BITS]


def test_a_path_that_the_processor_has_not_is_left_out() -> None:
    nowhere = SearchPath("C++, of another processor", "no-such-set", (), 1)
    rows = encoder_rows((nowhere, PATHS[-1]), rows=1)
    assert {row.context["path"] for row in rows} == {"torch"}


def test_a_layer_is_compressed_whole() -> None:
    shape = MoEShape("small", hidden=64, intermediate=48, experts=4, top_k=2, layers=1)
    (row,) = layer_rows(shape, workers=1)
    assert row.target == 2.5
    assert row.met
    assert row.context["weights"] == 3 * 4 * 48 * 64
    assert 0.001 < row.context["relative_error"] < 0.02
    assert 0.25 < row.context["bytes_ratio"] < 0.27
