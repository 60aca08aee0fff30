"""The coders' benchmark: its errors, and that trellis codes lose less than plain ones at fewer bits."""

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.coders import CODERS, GROUPS, TAILS, main


def test_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = CliRunner().invoke(main, ["--rows", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    errors = {row["name"]: row for row in rows if row["name"].endswith("relative squared error")}
    assert len(errors) == len(TAILS) * len(GROUPS) * sum(len(widths) for _, widths in CODERS.values())
    for tails in TAILS:
        for bits in (2, 3, 4):
            best = errors[f"{tails}, trellis, {bits} bits by row: relative squared error"]
            plain = errors[f"{tails}, plain codes, {bits} bits by 128: relative squared error"]
            assert best["value"] < 0.75 * plain["value"]
            assert best["bits_a_weight"] < plain["bits_a_weight"]
