"""The quality benchmark: the order of methods, sizes, merging by law, and its scores against `resmoe eval`'s."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.models.reference_models import build_reference_model, preset_config
from benchmarks.quality import __main__ as command
from benchmarks.quality import compare, methods, verdicts
from benchmarks.quality.merging import RouterUse, merge_all, merge_groups
from benchmarks.quality.methods import (
    CENTER_BITS,
    CENTER_TRELLIS,
    FITTED,
    PAPER,
    PLAIN_BITS,
    TRELLIS_BITS,
    Method,
    knob_for,
    run_method,
)
from benchmarks.quality.picture import STYLES, line_of, read_measured
from benchmarks.quality.subject import Checkpoint, Subject
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.evaluation.config import make_text_config
from compress_tools.evaluation.perplexity import evaluate
from compress_tools.pipeline import compress

TOKENS, WINDOW = 200, 31


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Upcycled, bf16, E 4, H 64, I 64; noise on the copies makes their rows worth matching."""
    folder = tmp_path_factory.mktemp("quality") / "small"
    build_reference_model(preset_config("tiny", expert_noise=0.6), folder)
    return folder


@pytest.fixture(scope="module")
def subject(small) -> Subject:
    return Subject(small, TOKENS, WINDOW, WINDOW)


@pytest.fixture(scope="module")
def paper(subject) -> dict[str, compare.Measured]:
    return {one.name: one for one in compare.paper_section(subject, "small", lambda text: None)}


def test_order_of_methods_in_the_papers_table(subject, paper) -> None:
    assert 0.1 < subject.residual_energy_share < 0.6
    rows = {row.name: row for row in verdicts.verdicts("small", subject.residual_energy_share, [*paper.values()])}
    assert len(rows) == 1 + len(verdicts.ORDER)
    assert not [name for name, row in rows.items() if "error of" in name and not row.met]
    error = {name: one.relative_error for name, one in paper.items()}
    assert error["ResMoE (UP)"] < 0.7 * error["plain pruning (UP)"]
    assert error["ResMoE (SVD)"] < error["plain SVD"]
    assert max(error["ResMoE (UP)"], error["ResMoE (SVD)"]) < error["merging, barycenter"]
    assert paper["merging, barycenter"].ratio == pytest.approx(1 / 4, abs=1e-3)


@pytest.mark.parametrize("method", [PAPER[4], PLAIN_BITS[0]], ids=lambda method: method.name)
def test_scores_are_those_of_resmoe_eval(small, subject, tmp_path, method) -> None:
    outcome = run_method(subject, method, 0.25 if method.knob else None)
    target = tmp_path / "written"
    report = compress(small, target, make_config(**outcome.options))
    assert report.expert_bytes_after == outcome.bytes_disk
    asked = make_text_config(
        text=str(small / "heldout.txt"),
        against=str(small),
        window=WINDOW,
        stride=WINDOW,
        max_tokens=TOKENS + 1,
        dtype="float32",
    )
    wanted, found = evaluate(str(target), asked), subject.score(outcome.experts)
    assert found.positions == wanted.tokens_scored
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)
    assert found.mean_kl == pytest.approx(wanted.kl_nats, rel=1e-2, abs=1e-6)
    assert found.kl_percentile(99) == pytest.approx(wanted.kl_p99_nats, rel=2e-2, abs=1e-6)
    assert found.max_kl == pytest.approx(wanted.kl_max_nats, rel=2e-2, abs=1e-6)
    assert found.top1_agreement == pytest.approx(wanted.top1_agreement, abs=0.011)


def test_original_is_put_back_after_each_method(subject) -> None:
    before = subject.score({})
    subject.score({0: [subject.read_layer(0)[0]] * 4})
    after = subject.score({})
    assert after.loss == before.loss
    assert after.kl == pytest.approx(0, abs=1e-6)
    assert after.top1_agreement == 1


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.name)
def test_fitted_methods_use_their_bytes_and_no_more(subject, method) -> None:
    value = knob_for(subject, method, 0.45)
    size = run_method(subject, method, value).bytes_disk / subject.expert_bytes
    if value < 0.999:  # otherwise everything is kept in fewer bytes
        # A rank is a coarse step in a matrix this small.
        assert 0.45 - (0.001 if method.options["method"] == "prune" else 0.05) < size
    assert size <= 0.45
    assert (knob_for(subject, method, 0.05) is None) == (
        method.options.get("center") != "none" or method.options["method"] == "prune"
    )


@pytest.mark.parametrize("method", [methods.PLANNER, methods.PLANNER_BY_OUTPUT], ids=lambda method: method.name)
def test_planner_keeps_to_the_size_and_is_no_worse_than_plain_bits(method: Method, subject: Subject) -> None:
    made = run_method(subject, method, 0.25)
    assert 0.9 * 0.25 < made.bytes_disk / subject.expert_bytes <= 0.25
    plain = run_method(subject, next(one for one in PLAIN_BITS if one.name == "plain 3-bit"))
    assert plain.bytes_disk < 0.25 * subject.expert_bytes
    if method is methods.PLANNER:
        assert made.relative_error <= plain.relative_error


def test_equal_experts_merge_without_error() -> None:
    one = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    design = torch.stack([one, one[torch.randperm(6, generator=torch.Generator().manual_seed(1))]])
    assert merge_all(design, "git-rebasin").squared_error == pytest.approx(0, abs=1e-5)
    assert merge_all(design, "barycenter").squared_error == pytest.approx(0, abs=1e-5)
    assert merge_all(design, "mean").squared_error > 1


def test_groups_form_around_the_most_used_and_weigh_by_use() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 6, generator=generator) for _ in range(2))
    design = torch.stack([first, second, first + 0.01, second + 0.01])
    tokens = torch.randn(20, 2, generator=generator)
    use = RouterUse(tokens[:, [0, 1, 0, 1]], torch.tensor([0.3, 0.1, 0.2, 0.4]))
    merged = merge_groups(design, use, 2)
    assert merged.group.tolist() == [1, 0, 1, 0]  # expert 3 is used most, then 0
    assert torch.allclose(merged.centers[1], 0.6 * design[0] + 0.4 * design[2], atol=1e-6)
    assert torch.allclose(merged.centers[0], 0.8 * design[3] + 0.2 * design[1], atol=1e-6)
    alone = merge_groups(design, use, 4)
    assert alone.squared_error == 0
    assert sorted(alone.group.tolist()) == [0, 1, 2, 3]


def test_calibrated_rows_know_the_training_text(subject, monkeypatch) -> None:
    monkeypatch.setattr(compare, "TRELLIS_BITS", TRELLIS_BITS[1:2])
    monkeypatch.setattr(compare, "PLANNER_BY_OUTPUT", replace(methods.PLANNER, options={"coders": "trellis"}))
    monkeypatch.setattr(compare, "PLANNER", replace(methods.PLANNER, options={"coders": "trellis", "uniform": True}))
    rows = list(compare.calibration_section(subject, "small", [0.3], lambda text: None))
    assert [row.name for row in rows] == ["trellis 3-bit, calibrated"] + ["ResMoE planner, calibrated"] * 2
    plain = run_method(subject, TRELLIS_BITS[1])
    assert rows[0].bytes_disk == plain.bytes_disk
    assert rows[0].relative_error > plain.relative_error  # of plain weights: what counts less is coded worse
    assert all(row.ratio <= 0.3 for row in rows[1:])


def test_layer_groups_leave_the_others_alone(subject) -> None:
    rows = list(compare.layers_section(subject, "small", lambda text: None))
    assert {row.name.rsplit(", ", 1)[1] for row in rows} == {"bottom (layers 0)", "middle (layers 0)", "top (layers 1)"}
    assert all(row.ratio > 0.5 for row in rows)


def test_center_overhead_falls_with_the_number_of_experts(subject, tmp_path) -> None:
    shares = []
    for count in (4, 8):
        compare.write_upcycled_layer(subject, count, tmp_path / str(count))
        made = Checkpoint(tmp_path / str(count))
        outcome = run_method(made, PAPER[4], 0.25)
        plain = run_method(made, PAPER[0], 0.25)
        assert (outcome.bytes_center, plain.bytes_center) == (made.expert_bytes // count, 0)
        assert outcome.relative_error < plain.relative_error
        shares.append((outcome.bytes_disk - plain.bytes_disk) / made.expert_bytes)
    assert shares == [pytest.approx(1 / 4), pytest.approx(1 / 8)]


def test_every_method_has_a_line_in_the_picture() -> None:
    names = [
        method.name for method in (*FITTED, methods.PLANNER, *PLAIN_BITS, *CENTER_BITS, *TRELLIS_BITS, *CENTER_TRELLIS)
    ]
    assert {line_of(name) for name in names} <= set(STYLES)


def test_command_writes_rows_and_picture(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "CENTER_BITS", CENTER_BITS[:1])
    monkeypatch.setattr(compare, "PLAIN_BITS", PLAIN_BITS[:1])
    monkeypatch.setattr(compare, "TRELLIS_BITS", TRELLIS_BITS[:1])
    monkeypatch.setattr(compare, "CENTER_TRELLIS", [])
    monkeypatch.setattr(methods, "FITTED", FITTED[:1])
    rows_file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    words = ["--model", str(small), "--tokens", "64", "--window", "31", "--section", "bytes", "--ratio", "0.3"]
    done = CliRunner().invoke(command.main, [*words, "--json", str(rows_file), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert "at equal bytes" in done.stdout
    rows = json.loads(rows_file.read_text())["rows"]
    assert rows[0]["method"] == "original"
    assert {"bytes_disk", "bytes_resident", "relative_error", "kl_nats", "top1_agreement", "window", "commit"} <= set(
        rows[1]
    )
    assert 0 < rows[1]["kl_nats"] < rows[1]["kl_p99_nats"] <= rows[1]["kl_max_nats"]
    assert "99 %" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = read_measured(rows_file)
    assert [one.name for one in again] == [row["method"] for row in rows if "method" in row]
    assert all(one.kl_nats is not None and one.ratio > 0 for one in again)
    other = tmp_path / "other"
    shutil.copytree(small, other)
    words[1] = str(other)
    # Rows of another model are added to the file.
    monkeypatch.setattr(command, "bytes_section", lambda *_: [])
    more = CliRunner().invoke(command.main, [*words, "--json", str(rows_file)])
    assert more.exit_code == 0, more.output
    assert {row["model"] for row in json.loads(rows_file.read_text())["rows"]} == {"small", "other"}


def test_target_row_holds_the_planner_against_plain_4_bit(paper) -> None:
    base = replace(paper["ResMoE (UP)"], section="bytes", perplexity=20.0)
    plain = replace(base, name="plain 4-bit", perplexity=21.0)
    planned = replace(base, name="ResMoE planner", asked_ratio=0.25)
    (_, row) = verdicts.verdicts("small", 0.3, [plain, planned, replace(planned, asked_ratio=0.45, perplexity=19.0)])
    assert (row.value, row.target, row.met) == (20.0, 21.0, True)


def test_target_rows_of_trellis_codes_the_planner_and_a_merged_model(paper) -> None:
    base = replace(paper["ResMoE (UP)"], section="bytes", family="plain", perplexity=20.0, kl_nats=0.010)
    at = {ratio: round(ratio * base.bytes_original) for ratio in (0.08, 0.1, 0.14, 0.19, 0.2)}
    found = [
        replace(base, section="original", name="original", perplexity=19.95),
        replace(base, name="plain 2-bit", bytes_disk=at[0.14], kl_nats=0.050),
        replace(base, name="plain 3-bit", bytes_disk=at[0.19]),
        replace(base, name="plain 4-bit", bytes_disk=round(0.26 * base.bytes_original), kl_nats=0.001),
        replace(base, name="trellis 3-bit", family="ResMoE", kl_nats=0.006, perplexity=19.9),
        replace(base, name="ResMoE planner", family="ResMoE", asked_ratio=0.2, bytes_disk=at[0.2], kl_nats=0.008),
        replace(base, name="ResMoE planner", family="ResMoE", asked_ratio=0.1, bytes_disk=at[0.08], perplexity=20.1),
    ]
    rows = {row.name: row for row in verdicts.verdicts("merged", 0.01, found)}
    kl = next(row for name, row in rows.items() if "KL of trellis 3-bit" in name)
    assert (kl.value, kl.target, kl.met) == (pytest.approx(0.6), 0.7, True)
    assert next(row for name, row in rows.items() if "perplexity of trellis 3-bit" in name).met
    # Of plain methods the best that fits: 3 bits, not 4.
    planned = next(row for name, row in rows.items() if "KL of ResMoE planner" in name)
    assert (planned.value, planned.target, planned.met) == (pytest.approx(0.8), 0.65, False)
    assert "plain 3-bit's at 19.0%" in planned.name
    assert next(row for name, row in rows.items() if "1.005 times the original's" in name).met
    assert not next(row for name, row in rows.items() if "at most plain 3-bit's" in name).met
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picture", "x.jpg"], "end the name in .png"),
        (["--picture", "x.png", "--section", "paper"], "ask for it too"),
        (["--model", "a/m", "--model", "b/m"], "two folders of one name"),
        (["--model", "/no/such"], "no heldout.txt|no such directory"),
        (["--ratio", "1"], "--ratio"),
        (["--section", "all"], "--section"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_requests(words: list[str], message: str) -> None:
    done = CliRunner().invoke(command.main, words)
    assert done.exit_code != 0
    assert re.search(message, done.output)


def test_a_short_text_is_refused(small) -> None:
    with pytest.raises(CheckpointError, match="held-out tokens"):
        Subject(small, 10**7, WINDOW, WINDOW)
