"""Slices as Ray tasks: the same bytes as one run. Skipped without Ray, but for the sentence that says so."""

import importlib.util
import sys
from pathlib import Path

import click
import pytest

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError, ConfigError, NumericalError
from compress_tools.pipeline import compress
from compress_tools.ray_cluster import cli, compress_on_cluster
from tests.compress_tools.test_pipeline import EXPERT, contents, rewritten

QUICK = make_config(center="mean", workers=1)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def two_workers() -> object:
    """A cluster of this machine alone, shared by the tests: it takes seconds to start."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_without_ray_the_command_says_what_to_install(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'resmoe\[ray\]'"):
        compress_on_cluster(tiny_mixtral, tmp_path / "small", QUICK, 2)


def test_every_recipe_option_is_there() -> None:
    names = {parameter.name for parameter in cli.get_params(click.Context(cli))}
    assert {"shards", "address", "cpus_per_task", "method", "retain_ratio", "layers", "center"} <= names


@needs_ray
@pytest.mark.usefixtures("two_workers")
def test_the_same_bytes_as_one_run(tiny_mixtral: Path, tmp_path: Path) -> None:
    compress(tiny_mixtral, tmp_path / "one" / "small", QUICK)
    compress_on_cluster(tiny_mixtral, tmp_path / "many" / "small", QUICK, 2)
    assert contents(tmp_path / "many" / "small") == contents(tmp_path / "one" / "small")
    logs = ["small.log", "small.shard-1-of-2.log", "small.shard-2-of-2.log"]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["small", *logs]


@needs_ray
@pytest.mark.usefixtures("two_workers")
def test_a_failed_slice_fails_the_run_and_the_others_are_kept(tiny_olmoe: Path, tmp_path: Path) -> None:
    import torch

    source = rewritten(tiny_olmoe, tmp_path / "source", {EXPERT: torch.full((24, 64), float("nan"))})
    with pytest.raises(NumericalError, match=EXPERT):
        compress_on_cluster(source, tmp_path / "small", QUICK, 2)
    assert (tmp_path / "small.shard-1-of-2").is_dir()
    assert not (tmp_path / "small").exists()
    with pytest.raises(ConfigError, match="at most 2 slices"):
        compress_on_cluster(source, tmp_path / "small", QUICK, 3)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        compress_on_cluster(source, tmp_path / "small", QUICK, 2)


def test_the_command_wants_a_method(tiny_mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--method is missing"):
        cli.main([str(tiny_mixtral), str(tmp_path / "small"), "--shards", "2"], standalone_mode=False)
