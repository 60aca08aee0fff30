"""The images and the compose file, without an engine: lint, parse, and what an operator relies on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.packaging.dockerfile import read

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"
FLAVORS = ("cpu", "cuda")


def instructions(flavor: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, comments dropped and continuation lines joined."""
    return [(step.name, step.rest) for step in read(DOCKER / f"Dockerfile.{flavor}")]


def only(flavor: str, name: str) -> str:
    """The arguments of an instruction that stands there once."""
    (found,) = [arguments for instruction, arguments in instructions(flavor) if instruction == name]
    return found


@pytest.mark.parametrize("flavor", FLAVORS)
def test_hadolint(flavor: str):
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKER / f"Dockerfile.{flavor}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("flavor", FLAVORS)
def test_image_runs_the_install_script_of_make_venv(flavor: str):
    steps = [arguments for instruction, arguments in instructions(flavor) if instruction == "RUN"]
    assert [step for step in steps if f"docker/install.sh {flavor} " in step]
    assert not [step for step in steps if "pip install" in step]
    assert "docker/install.sh cpu $(VENV)" in (REPO / "Makefile").read_text()


@pytest.mark.parametrize("flavor", FLAVORS)
def test_image_copies_what_exists_and_what_the_script_reads(flavor: str):
    sources = " ".join(arguments for instruction, arguments in instructions(flavor) if instruction == "COPY").split()
    needed = {"docker/install.sh", f"docker/constraints-{flavor}.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert needed | {"compress_tools", "resmoe_vllm"} <= set(sources)
    assert ("docker/vllm-cpu-name" in sources) == (flavor == "cpu")
    assert all((REPO / source).exists() for source in sources if source not in (".", "./"))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_image_serves_as_a_user_and_is_watched(flavor: str):
    assert int(only(flavor, "USER").split(":")[0]) > 0
    assert only(flavor, "ENTRYPOINT") == '["vllm", "serve", "/model"]'
    assert "/health" in only(flavor, "HEALTHCHECK")
    order = [instruction for instruction, _ in instructions(flavor)]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")


def compose() -> dict[str, Any]:
    """The services of the compose file."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_compose_builds_both_images_and_mounts_the_model():
    services = compose()
    assert set(services) == {*FLAVORS, "prometheus"}
    for flavor in FLAVORS:
        service = services[flavor]
        assert service["profiles"] == [flavor]
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / f"Dockerfile.{flavor}")
        (volume,) = service["volumes"]
        assert volume.startswith("${RESMOE_MODEL:?")
        assert volume.endswith(":/model:ro")
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_compose_listens_on_this_machine_alone_unless_told_and_never_without_a_key():
    services = compose()
    for flavor in FLAVORS:
        assert services[flavor]["ports"] == ["${RESMOE_BIND:-127.0.0.1}:${RESMOE_PORT:-8000}:8000"]
        assert services[flavor]["environment"]["VLLM_API_KEY"].startswith("${RESMOE_API_KEY:?")
    (port,) = services["prometheus"]["ports"]
    assert port.startswith("127.0.0.1:")


def test_prometheus_reads_the_server_of_either_flavor():
    services = compose()
    mounted = services["prometheus"]["volumes"][0].split(":")[0]
    (job,) = yaml.safe_load((DOCKER / mounted).read_text())["scrape_configs"]
    ((target,),) = [entry["targets"] for entry in job["static_configs"]]
    name, port = target.split(":")
    assert "metrics_path" not in job  # /metrics
    for flavor in FLAVORS:
        assert services[flavor]["networks"]["default"]["aliases"] == [name]
        assert only(flavor, "EXPOSE") == port
        assert flavor in services["prometheus"]["profiles"]
