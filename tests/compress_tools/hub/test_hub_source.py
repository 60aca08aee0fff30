"""A model of the hub is compressed as the same model in a directory is; nothing is fetched that is not needed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.config import make_config
from compress_tools.errors import CheckpointError
from compress_tools.hub import files
from compress_tools.hub.files import HubFiles, is_hub_name, source_files
from compress_tools.hub.repository import STEP_BYTES, _Steps, open_repository
from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.probe.config import make_probe_config
from compress_tools.probe.probe import probe
from compress_tools.progress.listener import Silent
from compress_tools.source.source_reader import SourceReader
from tests.compress_tools.hub.conftest import EXTRAS, NAME, Resmoe
from tests.hub_server.repository import HubFile, Repository, files_of
from tests.hub_server.server import Fault, HubServer

QUICK = make_config(center="mean", workers=1)


def weights_of(directory: Path) -> dict[str, bytes]:
    """A checkpoint's weight files."""
    return {name: content for name, content in files_of(directory).items() if name.endswith(".safetensors")}


def shards_sent(hub: HubServer, model: Path) -> dict[str, int]:
    """Bytes that were sent of each of the model's weight files."""
    return {file.name: hub.sent(file.name) for file in sorted(model.glob("*.safetensors"))}


def test_compress_as_from_a_directory(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    compress(tiny_mixtral, tmp_path / "here", QUICK)
    code, _, err = resmoe(
        "compress", NAME, tmp_path / "fetched", "--method", "prune", "--center", "mean", "--workers", "1"
    )
    assert (code, f"{NAME} at commit {mixtral.revisions['main']} (main)" in err) == (0, True)
    here, fetched = files_of(tmp_path / "here"), files_of(tmp_path / "fetched")
    assert weights_of(tmp_path / "here") == weights_of(tmp_path / "fetched")
    assert set(fetched) - set(here) == {"tokenizer.json", "LICENSE", "SOURCE_README.md"}
    assert here["config.json"] == fetched["config.json"]


def test_the_commit_is_in_report_card_and_record(
    hub: HubServer, mixtral: Repository, tmp_path: Path, resmoe: Resmoe
) -> None:
    commit = mixtral.revisions["main"]
    assert (
        resmoe("compress", NAME, tmp_path / "small", "--method", "prune", "--center", "mean", "--workers", "1")[0] == 0
    )
    report = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())
    assert report["source"] == {"repository": NAME, "revision": "main", "commit": commit}
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    identity = index["resmoe_run"]["identity"]["source"]
    assert (identity["repository"], identity["commit"]) == (NAME, commit)
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    assert f"`{NAME}` at commit `{commit}`" in card
    assert f"resmoe compress {NAME} small --revision {commit} " in card


def test_every_file_is_copied_or_named(hub: HubServer, mixtral: Repository, tmp_path: Path) -> None:
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "small", QUICK)
    left_out = json.loads((tmp_path / "small" / "resmoe_report.json").read_text())["left_out"]
    assert left_out == {
        "pytorch_model.bin": "weights in another format",
        "consolidated.safetensors": "weights in another format",
        "original/params.json": "a second copy of the model, in another format",
        "modeling_own.py": "code that no config names",
        "picture.png": "nothing that loads or serves the model reads it",
    }
    assert not any(hub.sent(name) for name in left_out)
    written = set(files_of(tmp_path / "small"))
    published = set(mixtral.commits[mixtral.revisions["main"]])
    weights = {name for name in published if name.endswith(".safetensors")}
    assert published - weights - set(left_out) - {".gitattributes"} <= written


def test_code_comes_where_a_config_names_it(hub: HubServer, mixtral: Repository, tiny_mixtral: Path) -> None:
    files = files_of(tiny_mixtral)
    tokenizer = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}).encode()
    mixtral.commit({**files, "tokenizer_config.json": tokenizer, "tokenization_own.py": b"pass\n", "own/x.py": b"\n"})
    found = HubFiles(open_repository(NAME, None))
    assert {name for name in found.names() if name.endswith(".py")} == {"tokenization_own.py", "own/x.py"}
    assert [found.why_left_out(name) for name in ("tokenization_own.py", "own/x.py")] == [None, None]
    assert (found.path / "own" / "x.py").read_bytes() == b"\n"


def test_a_plan_fetches_headers_alone(hub: HubServer, mixtral: Repository, tiny_mixtral: Path) -> None:
    # Wide enough that the header and what is read with it are a small part.
    torch.manual_seed(0)
    found = make_target(SourceReader(HubFiles(open_repository(NAME, None))), QUICK)
    assert found.summary() == make_target(SourceReader(tiny_mixtral), QUICK).summary()
    weights = [file.name for file in tiny_mixtral.glob("*.safetensors")]
    assert not any(hub.whole(name) for name in weights)
    assert sum(own.method == "GET" and own.path.startswith("/store/") for own in hub.asked) == len(weights)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_parts_are_what_the_whole_is(
    family: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors and rows, of headers longer than what is asked for at first, and by small windows."""
    monkeypatch.setattr(files, "_HEADER_BYTES", 100)
    monkeypatch.setattr(files, "_SMALL_BYTES", 300)
    monkeypatch.setattr(files, "_WINDOW_BYTES", 1000)
    model = save_tiny_model(family, tmp_path / "model", torch.bfloat16, max_shard_size="120kB")
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(model))
    found, here = SourceReader(HubFiles(open_repository(NAME, None))), SourceReader(model)
    assert found.names == here.names
    for name in here.names:
        assert torch.equal(found.get(name), here.get(name))
        for row in (0, here.shape(name)[0] - 1, -1):
            assert torch.equal(found.get_row(name, row), here.get_row(name, row))
        with pytest.raises(CheckpointError, match="can't read"):
            found.get_row(name, here.shape(name)[0])
    assert not any(hub.whole(file.name) for file in model.glob("*.safetensors"))


def test_a_probe_reads_what_it_samples(hub: HubServer, mixtral: Repository, tiny_mixtral: Path) -> None:
    config = make_probe_config(max_layers=1, experts=2, workers=1)
    found, here = probe(HubFiles(open_repository(NAME, None)), config), probe(str(tiny_mixtral), config)
    assert [own.residual for own in found.layers] == [own.residual for own in here.layers]
    assert found.source == NAME
    assert not any(hub.whole(file.name) for file in tiny_mixtral.glob("*.safetensors"))


def test_verify_tells_one_source_from_both_places(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    whole = shutil.copytree(tiny_mixtral, tmp_path / "whole")
    for name, content in EXTRAS.items():
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_bytes(content)
    compress(whole, tmp_path / "from-directory", QUICK)
    assert (tmp_path / "from-directory" / "picture.png").is_file()
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "from-hub", QUICK)
    found = [
        resmoe("verify", tmp_path / made, "--against", *against, "--json")
        for made, *against in (
            ("from-directory", whole),
            ("from-directory", NAME),
            ("from-directory", NAME, "--stream"),
            ("from-hub", NAME, "--revision", mixtral.revisions["main"]),
            ("from-hub", whole),
        )
    ]
    assert [code for code, _, _ in found] == [0] * 5
    layers = [json.loads(out)["layers"] for _, out, _ in found]
    assert all(own == layers[0] for own in layers)
    assert len(layers[0]) == 3


def test_verify_finds_another_model_on_the_hub(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path, resmoe: Resmoe
) -> None:
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "small", QUICK)
    mixtral.commit({**mixtral.commits[mixtral.revisions["main"]], "tokenizer.json": HubFile(b"{ }\n")})
    code, _, err = resmoe("verify", tmp_path / "small", "--against", NAME)
    assert (code, "tokenizer.json differs" in err) == (4, True)
    code, _, err = resmoe("verify", tmp_path / "small", "--stream")
    assert (code, "--stream has no effect without --against" in err) == (2, True)


def test_a_directory_wins(
    hub: HubServer,
    mixtral: Repository,
    tiny_mixtral: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resmoe: Resmoe,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(NAME)
    shutil.copytree(tiny_mixtral, tmp_path / NAME)
    assert not is_hub_name(NAME)
    assert resmoe("plan", NAME, "--method", "prune")[0] == 0
    assert hub.asked == []
    code, _, err = resmoe("plan", NAME, "--revision", "main")
    assert (code, f"--revision has no effect: {NAME} is not a model of the hub" in err) == (2, True)


@pytest.mark.parametrize("name", ["/org/name", "org/name/more", "name", "../org/name", "./org", "org/", "-x/y", ""])
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)


def test_a_revision_and_the_cache_that_remembers_it(
    hub: HubServer, mixtral: Repository, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mixtral.revisions["main"]
    files = files_of(tiny_mixtral)
    second = mixtral.commit({**files, "notes.md": b"new"}, "next")
    assert open_repository(NAME, "next").commit == second
    assert open_repository(NAME, None).commit == first
    assert open_repository(NAME, second).commit == second
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert open_repository(NAME, "next").commit == second
    assert open_repository(NAME, None).commit == first
    assert len(hub.asked) == asked


def test_offline_from_a_whole_cache_and_not_from_a_part(
    hub: HubServer, mixtral: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source_files(NAME, None, None) as source:
        SourceReader(source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set and model-\S+ is not in the hub's cache"):
        SourceReader(HubFiles(open_repository(NAME, None)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "online", QUICK)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with source_files(NAME, None, None) as source:
        compress(source, tmp_path / "offline", QUICK)
    assert weights_of(tmp_path / "online") == weights_of(tmp_path / "offline")


def test_fetched_once(hub: HubServer, mixtral: Repository, tiny_mixtral: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with source_files(NAME, None, None, Silent()) as source:
            compress(source, tmp_path / name, QUICK)
    assert {hub.whole(file.name) for file in tiny_mixtral.glob("*.safetensors")} == {1}


def test_steps_of_a_transfer() -> None:
    """A large file's bytes are steps of a stage; by xet two bars tell of the same bytes."""
    told: list[object] = []

    class Counting(Silent):
        def stage(self, text: str, total: int | None, layer: int | None = None) -> None:
            told.append((text, total))

        def step(self) -> None:
            told.append("step")

    bars = _Steps(Counting(), 2 * STEP_BYTES + 1).bar()
    with bars(total=2 * STEP_BYTES + 1) as written, bars() as arrived:
        for bar in (arrived, written):
            for count in (STEP_BYTES // 2, STEP_BYTES, STEP_BYTES // 2 + 1):
                bar.update(count)
    assert told == [("fetching", 3), "step", "step"]


def test_the_library_keeps_quiet(hub: HubServer, mixtral: Repository, tmp_path: Path, resmoe: Resmoe) -> None:
    hub.faults = [Fault("/store/", 2, status=503), Fault("/store/", 2, methods=("GET",), cut_after=100)]
    code, out, err = resmoe(
        "compress", NAME, tmp_path / "small", "--method", "prune", "--center", "mean", "--workers", "1", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["source"]["repository"] == NAME
    assert [fault.times for fault in hub.faults] == [0, 0]
    log = (tmp_path / "small.log").read_text()
    assert len(re.findall(r"fetching model-0000\d-of-00007.safetensors of org/tiny-mixtral, \d", log)) == 7
