"""GGUF's baselines: bytes as GGUF counts them, the package's own codes, and what leaves rows out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models.reference_models import build_reference_model, preset_config
from benchmarks.quality import gguf_baselines
from benchmarks.quality.gguf_baselines import GGUF, run_gguf
from benchmarks.quality.methods import PLAIN_BITS, run_method
from benchmarks.quality.picture import STYLES, line_of
from benchmarks.quality.subject import Subject
from compress_tools.architectures.experts import MoESizes

Q4_0, Q8_0 = GGUF


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Upcycled, bf16, E 4, H 64, I 64."""
    folder = tmp_path_factory.mktemp("gguf") / "small"
    build_reference_model(preset_config("tiny"), folder)
    return Subject(folder, 64, 31, 31)


def by_hand(row: Tensor, levels: int) -> Tensor:
    """Blocks of 32: Q4_0 scales by the value farthest from 0 over -8, Q8_0 by its size over 127; fp16 scales."""
    blocks = row.view(-1, 32)
    farthest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = farthest / -8 if levels == 16 else farthest.abs() / 127
    codes = (blocks / scale).add(8.5).floor().clamp(0, 15) - 8 if levels == 16 else (blocks / scale).round()
    return (codes * scale.half().float()).view_as(row)


@pytest.mark.parametrize(("method", "bits", "levels"), [(Q4_0, 4.5, 16), (Q8_0, 8.5, 256)], ids=["Q4_0", "Q8_0"])
def test_bytes_and_values_are_those_of_the_format(subject: Subject, method, bits: float, levels: int) -> None:
    pytest.importorskip("gguf")
    (outcome,) = run_gguf(subject, [method], pytest.fail)
    assert outcome.bytes_disk == outcome.bytes_resident == subject.expert_bytes * bits / 16
    dense, made = subject.read_layer(1)[2], outcome.experts[1][2]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        wanted = torch.stack([by_hand(row, levels) for row in dense.matrix(projection).float()])
        # A tie between two levels may fall either way: the package multiplies by the scale's inverse.
        off = (made.matrix(projection) - wanted).abs() > 1e-6
        assert off.float().mean() < 0.002
        assert (made.matrix(projection) - wanted).norm() < 0.02 * wanted.norm()


def test_the_error_is_a_mean_over_layers(subject: Subject) -> None:
    pytest.importorskip("gguf")
    (outcome,) = run_gguf(subject, [Q4_0], pytest.fail)
    shares = []
    for layer, experts in outcome.experts.items():
        pairs = [
            (dense.matrix(projection).float(), made.matrix(projection))
            for dense, made in zip(subject.read_layer(layer), experts, strict=True)
            for projection in ("gate_proj", "up_proj", "down_proj")
        ]
        shares.append(
            sum(float((one - two).square().sum()) for one, two in pairs)
            / sum(float(one.square().sum()) for one, _ in pairs)
        )
    assert outcome.relative_error == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_scored_like_the_others(subject: Subject) -> None:
    pytest.importorskip("gguf")
    small, large = run_gguf(subject, GGUF, pytest.fail)
    plain = {
        method.options["bits"]: run_method(subject, method) for method in PLAIN_BITS if method.options["bits"] in (3, 8)
    }
    assert large.relative_error < small.relative_error / 100 < plain[3].relative_error
    scores = {
        name: subject.score(one.experts) for name, one in {"small": small, "large": large, "plain": plain[3]}.items()
    }
    assert scores["large"].mean_kl < scores["small"].mean_kl < scores["plain"].mean_kl


def test_without_the_package_a_sentence_stands_for_the_rows(subject: Subject, monkeypatch) -> None:
    monkeypatch.setattr(gguf_baselines, "find_spec", lambda name: None)
    said: list[str] = []
    assert list(run_gguf(subject, GGUF, said.append)) == []
    assert said == ["left out: GGUF Q4_0, GGUF Q8_0: the package gguf is not installed; pip install 'resmoe[bench]'"]


def test_rows_that_blocks_do_not_divide_are_left_out() -> None:
    pytest.importorskip("gguf")
    odd: Any = SimpleNamespace(source=SimpleNamespace(sizes=MoESizes(4, 64, 80)))
    said: list[str] = []
    assert list(run_gguf(odd, [Q4_0], said.append)) == []
    assert said == ["left out: GGUF Q4_0: rows of 80 weights are no multiple of its blocks of 32"]


def test_both_have_a_line_in_the_picture() -> None:
    assert {line_of(method.name) for method in GGUF} <= set(STYLES)
