"""A hub on loopback that this process's hub library talks to, with a cache of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from compress_tools.hub import repository
from tests.compress_tools.cli.conftest import Resmoe, resmoe
from tests.hub_server.repository import Repository, files_of
from tests.hub_server.server import HubServer

__all__ = ["Resmoe", "resmoe"]

NAME = "org/tiny-mixtral"
EXTRAS = {
    "README.md": b"# The model's own card\n",
    "tokenizer.json": b"{}\n",
    "LICENSE": b"Of the model.\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "pytorch_model.bin": b"the same weights once more",
    "consolidated.safetensors": b"and once more",
    "original/params.json": b"{}\n",
    "modeling_own.py": b"print('not asked for')\n",
    "picture.png": b"no part of a model",
}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub, empty; whatever waits for another try waits no time."""
    with HubServer() as server:
        use(server, tmp_path_factory.mktemp("hub") / "cache", monkeypatch)
        yield server
    _http.close_session()


def use(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's library, which reads its environment once, at a server and a cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for module in (_http.time, repository.time):
        monkeypatch.setattr(module, "sleep", lambda seconds: None)
    # A closed client keeps no connection to a server that is gone.
    _http.close_session()


@pytest.fixture
def mixtral(hub: HubServer, tiny_mixtral: Path) -> Repository:
    """``tiny_mixtral``, three layers in seven weight files, published with other files around it."""
    published = hub.repositories[NAME] = Repository()
    published.commit(files_of(tiny_mixtral) | EXTRAS)
    return published


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """For a command in a process of its own."""
    return {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
