"""Slices of a model of the hub as Ray tasks: one commit, whatever the branch does meanwhile."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.ray_cluster import HubOptions, compress_on_cluster
from tests.compress_tools.hub.conftest import NAME
from tests.compress_tools.hub.test_hub_source import weights_of
from tests.hub_server.repository import Repository
from tests.hub_server.server import HubServer

QUICK = make_config(center="mean", workers=1)


class OneAfterTheOther(SimpleNamespace):
    """Ray's interface as far as it is used; each task runs here, when it is asked for."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def is_initialized(self) -> bool:
        return True

    def remote(self, function: Callable[..., Any]) -> Any:
        task = SimpleNamespace(remote=lambda *given: (function, given))
        return SimpleNamespace(options=lambda **options: task)

    def wait(self, tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        return tasks[:1], tasks[1:]

    def get(self, task: Any) -> Any:
        function, given = task
        return function(*given)


@pytest.mark.parametrize("stream", [False, True], ids=["fetched", "streamed"])
def test_all_tasks_take_one_commit(
    stream: bool,
    hub: HubServer,
    mixtral: Repository,
    tiny_mixtral: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = mixtral.revisions["main"]
    ray = OneAfterTheOther()

    def push_and_get(task: Any) -> Any:
        mixtral.commit({**mixtral.commits[mixtral.revisions["main"]], "README.md": b"changed"})
        return OneAfterTheOther.get(ray, task)

    monkeypatch.setattr(ray, "get", push_and_get, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    compress_on_cluster(NAME, tmp_path / "small", QUICK, 3, hub=HubOptions(stream=stream))
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    assert weights_of(tmp_path / "small") == weights_of(tmp_path / "here")
    report = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())
    assert report["source"] == {"repository": NAME, "revision": first, "commit": first}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["here", "small"]
    assert bool(list(Path(constants.HF_HUB_CACHE).rglob("model-*.safetensors"))) is not stream
