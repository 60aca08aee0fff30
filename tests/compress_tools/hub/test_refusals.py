"""What the hub, the network and the disk refuse, in a sentence with its way out; what passes is tried again."""

import errno
import re
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.errors import XetDownloadError

from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.hub import files
from compress_tools.hub.files import HubFiles, source_files
from compress_tools.hub.repository import open_repository
from compress_tools.pipeline import compress
from compress_tools.source.reader import INDEX_NAME
from compress_tools.source.source_reader import SourceReader
from tests.compress_tools.hub.conftest import NAME, Resmoe, use
from tests.compress_tools.hub.test_hub_source import weights_of
from tests.hub_server.repository import Repository, files_of
from tests.hub_server.server import Fault, HubServer

QUICK = make_config(center="mean", workers=1)
SHARD = "model-00003-of-00007.safetensors"


def opened() -> SourceReader:
    """The model's headers and small files."""
    return SourceReader(HubFiles(open_repository(NAME, None)))


def whole(dst: Path) -> None:
    """The model fetched and compressed."""
    with source_files(NAME, None, None) as source:
        compress(source, dst, QUICK)


def store_path(repository: Repository, name: str) -> str:
    """The path of a large file's request."""
    return f"/store/{repository.commits[repository.revisions['main']][name].sha256}"


def test_a_name_that_is_neither(hub: HubServer, tmp_path: Path, resmoe: Resmoe) -> None:
    code, out, err = resmoe("compress", "org/nothing", tmp_path / "small")
    assert (code, out) == (4, "")
    assert re.fullmatch(r"resmoe: org/nothing: no such directory, and no such model on http://127\.\S+, .*\n", err)
    for command in (["plan", "org/nothing"], ["probe", "org/nothing"]):
        assert resmoe(*command)[0] == 4
    assert resmoe("plan", "some/where/else")[2] == (
        "resmoe: some/where/else: no such directory; expected a Hugging Face checkpoint directory, or a model of the "
        "hub as ORG/NAME\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["org/na--me", "org/name.git", "org/name-", "org/" + 100 * "n"])
def test_a_name_that_the_hub_does_not_give(name: str, hub: HubServer, resmoe: Resmoe) -> None:
    code, _, err = resmoe("plan", name)
    assert (code, hub.asked) == (4, [])
    assert err.startswith(f"resmoe: {name}: no such directory, and no name of a model of the hub: ")
    assert err.count("\n") == 1


def test_what_is_no_hub(hub: HubServer, mixtral: Repository) -> None:
    """An address that answers everything, such as a proxy's page."""
    hub.faults = [Fault("", 1000, status=200)]
    with pytest.raises(CheckpointError, match=r"check your firewall and proxy|HF_ENDPOINT"):
        opened()
    hub.faults = [Fault("/api/models/", 1000, status=200)]
    with pytest.raises(CheckpointError, match="broke off"):
        opened()


def test_what_the_library_itself_refuses(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened()
    for err in (ValueError("The file is too large; install hf_xet"), RuntimeError("xet"), XetDownloadError("gone")):

        def refuse(*args: object, err: Exception = err, **kwargs: object) -> None:
            raise err

        monkeypatch.setattr(file_download, "http_get", refuse)
        with pytest.raises(CheckpointError, match=f"{SHARD}: .*{err}"):
            reader.store.prepare([SHARD])


def test_a_private_model(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral.token = "hf_secret"
    with pytest.raises(CheckpointError, match=r"or a private one; .* set HF_TOKEN"):
        opened()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(CheckpointError, match=r"or a private one; .* set HF_TOKEN"):
        opened()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(opened().names) == 60
    # The token is for the hub, not for where it sends us.
    assert {own.token for own in hub.asked if own.path.startswith("/store/")} == {None}


def test_a_gated_model(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral.token, mixtral.gated = "hf_secret", True
    for token in (None, "hf_other"):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            CheckpointError, match=rf"is gated on http\S+; accept its terms at http\S+/{NAME}, then log in"
        ):
            opened()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(opened().names) == 60


def test_no_such_revision(hub: HubServer, mixtral: Repository, resmoe: Resmoe) -> None:
    for revision in ("v9", "0" * 40):
        code, _, err = resmoe("plan", NAME, "--revision", revision)
        assert (code, f"has no revision '{revision}'" in err, "--revision takes" in err) == (4, True, True)


def test_no_model_in_the_repository(hub: HubServer, tiny_mixtral: Path) -> None:
    published = hub.repositories[NAME] = Repository()
    published.commit({"README.md": b"nothing else"})
    with pytest.raises(CheckpointError, match=r"has no config\.json on http"):
        opened()
    published.commit({"config.json": files_of(tiny_mixtral)["config.json"], "pytorch_model.bin": b"weights"})
    with pytest.raises(CheckpointError, match="only safetensors"):
        opened()


def test_a_shard_is_missing(hub: HubServer, mixtral: Repository) -> None:
    published = mixtral.commits[mixtral.revisions["main"]]
    commit = mixtral.commit({name: own for name, own in published.items() if name != SHARD})
    with pytest.raises(CheckpointError, match=f"{SHARD}, which the index names, is not at commit {commit}"):
        opened()


def test_a_shard_is_no_safetensors(hub: HubServer, mixtral: Repository) -> None:
    published = mixtral.commits[mixtral.revisions["main"]]
    for content in (
        b"version https://git-lfs.github.com/spec/v1\n",
        published[SHARD].content[:60],
        b"\2" + bytes(7) + b"{x",
    ):
        mixtral.commit({**published, SHARD: content})
        with pytest.raises(CheckpointError, match=f"{SHARD}"):
            opened()


def test_a_header_that_no_model_has(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_HEADER_BYTES", 500)
    with pytest.raises(CheckpointError, match=r"model-\S+ is no safetensors file"):
        opened()


def test_tensors_that_lie_behind_the_end(hub: HubServer, mixtral: Repository) -> None:
    published = mixtral.commits[mixtral.revisions["main"]]
    mixtral.commit({**published, SHARD: published[SHARD].content[:-1000]})
    reader = opened()
    last = max(
        (name for name in reader.names if reader.shard_of(name) == SHARD), key=lambda name: reader._stored[name].end
    )
    with pytest.raises(CheckpointError, match=f"{SHARD} ends before its tensors do"):
        reader.get(last)
    reader.store.prepare([SHARD])
    with pytest.raises(CheckpointError, match="truncated or corrupt shard"):
        reader.get(last)


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_hub_that_says_no(status: int, hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    advice = {403: "refuses access .* log in", 429: "too many requests", 500: "out of order", 503: "out of order"}[
        status
    ]
    for pattern in ("config.json", "/api/models/"):
        hub.faults = [Fault(pattern, 1000, status=status)]
        with pytest.raises(CheckpointError, match=advice):
            opened()
    hub.faults = []
    reader = opened()
    hub.faults = [Fault(SHARD, 1000, status=status)]
    with pytest.raises(CheckpointError, match=f"{SHARD}: .*{advice}"):
        reader.store.prepare([SHARD])
    for fetched in (True, False):
        hub.faults = [Fault("/store/", 1000, status=status)]
        with pytest.raises(CheckpointError, match=advice):
            opened() if fetched else reader.store.prepare([SHARD])


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_for_a_while(status: int, hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    hub.faults = [
        Fault("/api/models/", 2, status=status, headers={"Retry-After": "1"}),
        Fault("/resolve/.*/config.json", 2, status=status),
        Fault("/store/", 2, status=status),
    ]
    assert len(opened().names) == 60
    assert [fault.times for fault in hub.faults] == [0, 0, 0]


def test_a_cut_transfer_goes_on(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is taken from the connection at one time; a real one of 10 MB is more than these files have.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    reader = opened()
    size = (tiny_mixtral / SHARD).stat().st_size
    before = hub.sent(SHARD)
    hub.faults = [
        Fault(store_path(mixtral, SHARD), cut_after=70_000),
        Fault(store_path(mixtral, SHARD), cut_after=20_000),
    ]
    reader.store.prepare([SHARD])
    local = reader.store.local(SHARD)
    assert local is not None
    assert local.read_bytes() == (tiny_mixtral / SHARD).read_bytes()
    # Not one byte of them came twice.
    assert hub.sent(SHARD) - before == size
    here = SourceReader(tiny_mixtral)
    name = next(name for name in here.names if here.shard_of(name) != SHARD and here.nbytes(name) > 4096)
    hub.faults = [Fault("/store/", 3, cut_after=1000)]
    assert reader.get(name).equal(here.get(name))
    assert hub.faults[0].times == 0


def test_a_transfer_that_is_always_cut(hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    reader = opened()
    hub.faults = [Fault(store_path(mixtral, SHARD), 1000, cut_after=0)]
    with pytest.raises(
        CheckpointError, match=f"{SHARD}: http\\S+ can't be reached or broke off .*run the same command"
    ):
        reader.store.prepare([SHARD])
    with pytest.raises(CheckpointError, match="broke off"):
        whole(tmp_path / "small")
    hub.faults = []
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "small", QUICK, resume=True)
    assert weights_of(tmp_path / "small")


def test_a_file_of_another_size(hub: HubServer, mixtral: Repository) -> None:
    reader = opened()
    for wrong in (1, -1):
        hub.faults = [Fault(SHARD, 1000, methods=("HEAD",), size_off_by=wrong)]
        with pytest.raises(CheckpointError, match=f"{SHARD}: arrived with another size than the hub says"):
            reader.store.prepare([SHARD])
        assert reader.store.local(SHARD) is None
    hub.faults = []
    reader.store.prepare([SHARD])
    assert reader.store.local(SHARD) is not None


def test_a_slow_answer_is_asked_for_again(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    asked: list[str] = []
    hub.on_request = asked.append
    name = next(name for name in reader.names if reader.shard_of(name) != SHARD and reader.nbytes(name) > 4096)
    for path, ask in (
        (store_path(mixtral, SHARD), lambda: reader.store.prepare([SHARD])),
        (store_path(mixtral, reader.shard_of(name)), lambda: reader.get(name)),
    ):
        hub.faults = [Fault(path, 2, wait_s=1.0)]
        begun = len(asked)
        ask()
        assert asked[begun:].count(path) == 3


def test_no_network(hub: HubServer, mixtral: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "online")
    with HubServer() as gone:
        pass
    use(gone, Path(constants.HF_HUB_CACHE), monkeypatch)
    # All is in the cache, as for `vllm serve`.
    reader = opened()
    assert any("what its cache has is taken" in text for text in reader.remarks)
    whole(tmp_path / "from-cache")
    assert weights_of(tmp_path / "online") == weights_of(tmp_path / "from-cache")
    with pytest.raises(CheckpointError, match=r"org/other: no such directory, and http\S+ can't be reached"):
        open_repository("org/other", None)
    cached = reader.store.local(SHARD)
    assert cached is not None
    cached.unlink()
    with pytest.raises(CheckpointError, match=rf"http\S+ can't be reached, and {SHARD} is not in the hub's cache"):
        opened()


def test_a_full_disk(hub: HubServer, mixtral: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened()
    real = file_download.http_get
    number = errno.ENOSPC

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", refuse)
    with pytest.raises(CheckpointError, match=f"{SHARD}: no space left on device; make room on that disk"):
        reader.store.prepare([SHARD])
    monkeypatch.setattr(file_download, "http_get", real)
    reader.store.prepare([SHARD])
    assert reader.store.local(SHARD) is not None


def test_a_hub_that_gives_no_parts(hub: HubServer, mixtral: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a plain web server answers.
    monkeypatch.setattr("tests.hub_server.server._RANGE", re.compile("never"))
    with pytest.raises(CheckpointError, match=f"does not give parts of model-.*hf download {NAME}"):
        opened()


def test_an_index_that_is_cut(hub: HubServer, mixtral: Repository) -> None:
    published = mixtral.commits[mixtral.revisions["main"]]
    mixtral.commit({**published, INDEX_NAME: published[INDEX_NAME].content[:100]})
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}: is not JSON"):
        opened()
