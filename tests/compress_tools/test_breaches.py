"""What comes in is what goes out, whatever is done to it: each random breach is refused, reported, or found by verify.

``python -m tests.compress_tools.test_breaches 30 500`` tries many more than a test run does.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.tiny_drafts import add_draft
from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import ResMoEError
from compress_tools.format.shard_file import file_checksum
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.progress.listener import Silent
from compress_tools.report import REPORT_NAME, TIMINGS_NAME, CompressionReport
from compress_tools.source.reader import INDEX_NAME
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.verify import verify
from tests.compress_tools.breaches import all_files, breach, edit_json, weight_files
from tests.compress_tools.source.test_source_reader import fp8_rows

RECIPE = make_config(method="quantize", bits=4, center="mean", workers=1, layers="0-1")
# Each of the 15 kinds of breach at least once with each kind of source.
SEEDS = range(20)
SIZES = {"hidden_size": 16, "vocab_size": 24, "num_attention_heads": 1}


class Listener(Silent):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def with_files(path: Path) -> Path:
    (path / "original").mkdir()
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "README.md").write_text("card")
    (path / "original/params.json").write_text("{}")
    (path / "old.bin").write_text("x")
    return path


def sources(folder: Path) -> dict[str, Path]:
    """Good checkpoints by kind."""
    plain = save_tiny_model(
        "olmoe", folder / "plain", torch.bfloat16, num_experts=2, intermediate_size=8, max_shard_size="3kB", **SIZES
    )
    assert len(weight_files(plain)) > 2
    small = {"num_experts": 2, "intermediate_size": 8, **SIZES}
    quantised = save_tiny_model("olmoe", folder / "quantised", torch.bfloat16, **small)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(quantised / "model.safetensors").items():
        stored |= fp8_rows(name, tensor)[0] if "experts" in name else {name: tensor}
    save_file(stored, quantised / "model.safetensors")
    draft = save_tiny_model(
        "glm4_moe", folder / "draft", torch.bfloat16, n_routed_experts=2, moe_intermediate_size=8, hidden_size=16,
        vocab_size=24, num_hidden_layers=2, first_k_dense_replace=0, intermediate_size=8,
    )  # fmt: skip
    add_draft(draft, "glm4_moe")
    # 3-D tensors of all experts; a tied output layer, which is written out.
    fused = save_tiny_model(
        "olmoe", folder / "fused", torch.bfloat16, tie_word_embeddings=True, save_original_format=False, **small
    )
    return {path.name: with_files(path) for path in (plain, quantised, draft, fused)}


class Good:
    """Good sources, and what they are compressed to; made once, copied for each breach."""

    def __init__(self, folder: Path) -> None:
        self.sources = sources(folder)
        self.small = {kind: folder / f"small-{kind}" for kind in self.sources}
        for kind, source in self.sources.items():
            compress(source, self.small[kind], RECIPE)
            verify(self.small[kind], source)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("breaches"))


def tensors_in(folder: Path) -> dict[str, list[tuple[Path, Tensor]]]:
    """Tensors of all weight files that can be read, whatever an index says."""
    found: dict[str, list[tuple[Path, Tensor]]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            for name, tensor in load_file(file).items():
                found.setdefault(name, []).append((file, tensor))
        except (SafetensorError, OSError, ValueError):
            continue
    return found


def same(first: Tensor, second: Tensor) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


def unaccounted(source: Path, small: Path, report: CompressionReport) -> list[str]:
    """What of a source is neither in the output nor named; told from the files alone, without the project's reader."""
    missing = []
    copied = {name: tensor for name, ((_, tensor), *_) in tensors_in(small).items()}
    for name, places in tensors_in(source).items():
        for file, tensor in places:
            known = file.relative_to(source).as_posix() in report.left_out or name in report.left_out
            expert = ".mlp.experts." in name
            quantised = name.endswith(("_scale", "_scale_inv"))
            if not (known or expert or quantised or (name in copied and same(copied[name], tensor))):
                missing.append(f"{name} of {file.name}")
    for file in all_files(source):
        name = file.relative_to(source).as_posix()
        there = small / ("SOURCE_README.md" if name == "README.md" else name)
        if name in report.left_out or name in ("config.json", INDEX_NAME) or name.endswith(".safetensors"):
            continue
        if not there.is_file() or there.read_bytes() != file.read_bytes():
            missing.append(name)
    return missing


def refused(act: Callable[[], object]) -> str:
    """The sentence in which something is refused; empty if it is not."""
    try:
        act()
    except ResMoEError as err:
        return str(err)
    return ""


def check_source(good: Good, kind: str, seed: int, folder: Path) -> str:
    """Breach a source and compress it: refused in a sentence, or all of it is accounted for."""
    broken, small = folder / "broken", folder / "small"
    shutil.copytree(good.sources[kind], broken)
    what = breach(broken, seed)
    listener = Listener()
    refusal = refused(lambda: make_target(SourceReader(broken), RECIPE))
    try:
        report = compress(broken, small, RECIPE, progress=listener)
    except ResMoEError as err:
        refusal = str(err)
    if refusal:
        assert "\n" not in refusal, f"{what}: {refusal}"
        assert not small.exists(), what
        return f"{what}: refused: {refusal}"
    lost = unaccounted(broken, small, report)
    assert not [name for name in lost if not any(name.split()[0] in text for text in listener.said)], (what, lost)
    verify(small, broken)
    # Nothing that a model can't do without is missing in silence.
    gone = {
        name
        for name in set(tensors_in(good.sources[kind])) - set(tensors_in(broken))
        if not name.startswith("model.layers.2.") and not name.endswith("input_scale")
    }
    assert not gone, (what, gone)
    if contents(small) != contents(good.small[kind]):
        if finding := refused(lambda: verify(small, good.sources[kind])):
            return f"{what}: differs from the good one: {finding}"
        assert listener.said or report.left_out, what
    return f"{what}: harmless, said {[text for text in listener.said if 'left out' not in text]}"


def contents(folder: Path) -> dict[str, bytes]:
    names = {file.relative_to(folder).as_posix(): file for file in all_files(folder)}
    skip = {TIMINGS_NAME, REPORT_NAME, INDEX_NAME, "README.md"}
    return {name: file.read_bytes() for name, file in names.items() if name not in skip}


def restored(folder: Path) -> list[Tensor]:
    """Every expert's matrices, as the format block says them."""
    checkpoint = ResMoECheckpoint(folder)
    places = product(checkpoint.fmt.layers, range(checkpoint.fmt.num_experts))
    return [rows for layer, expert in places for rows in checkpoint.expert(layer, expert).values()]


def means_the_same(broken: Path, good: Path) -> bool:
    """Whether two format blocks of the same tensors make the same experts of them."""
    pairs = zip(restored(broken), restored(good), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def check_output(good: Good, kind: str, seed: int, folder: Path) -> str:
    """Breach a compressed checkpoint; ``verify --against`` finds it."""
    broken = folder / "small"
    shutil.copytree(good.small[kind], broken)
    before = contents(broken)
    what = breach(broken, seed)
    if seed % 2 and (broken / REPORT_NAME).is_file():
        # As a careful hand would leave it: the report has the checksums of what is there.
        sums = {file.name: file_checksum(file) for file in weight_files(broken) if file.is_file()}
        try:
            edit_json(broken / REPORT_NAME, lambda report: report.update(shards=sums))
        except ValueError:
            what += " (report unreadable)"
    for against in (None, good.sources[kind]):
        if finding := refused(partial(verify, broken, against)):
            assert "\n" not in finding, f"{what}: {finding}"
            return f"{what}: found{'' if against else ' by itself'}: {finding}"
    if what.startswith("config: quantization_config.") and means_the_same(broken, good.small[kind]):
        return f"{what}: means the same"
    written = {"README.md", REPORT_NAME, TIMINGS_NAME, "resmoe_recipe.json", INDEX_NAME}
    own = any(what.split()[-1].endswith(name) for name in written)
    assert own or contents(broken) == before, what
    return f"{what}: harmless"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["plain", "quantised", "draft", "fused"])
def test_a_breach_of_a_source(kind: str, seed: int, good: Good, tmp_path: Path) -> None:
    assert check_source(good, kind, seed, tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["plain", "quantised", "draft", "fused"])
def test_a_breach_of_an_output(kind: str, seed: int, good: Good, tmp_path: Path) -> None:
    assert check_output(good, kind, seed, tmp_path)


def main(begin: int, end: int) -> None:
    """Try seeds with each kind of source; print what happened, failures last."""
    failed = []
    with tempfile.TemporaryDirectory() as top:
        good = Good(Path(top) / "good")
        for seed in range(begin, end):
            for kind in good.sources:
                for check in (check_source, check_output):
                    folder = Path(tempfile.mkdtemp(dir=top))
                    try:
                        print(seed, kind, check.__name__, check(good, kind, seed, folder).replace(top, ""))
                    except Exception as err:
                        failed.append(f"{seed} {kind} {check.__name__} {type(err).__name__} {str(err)[:600]}")
                    shutil.rmtree(folder)
    print(f"{len(failed)} failed", *failed, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
