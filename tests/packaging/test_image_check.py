"""`make image-check` on small Dockerfiles: what it does, skips and refuses; no environment is installed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.packaging import image_check
from tests.packaging.dockerfile import DockerfileError, read
from tests.packaging.image_check import FLAVORS, Image

REPO = Path(__file__).resolve().parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WHOLE = f"""# Serves.
FROM python:{PYTHON}-slim

# hadolint ignore=DL3008
RUN apt-get update \\
    # a comment between
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1
COPY tools/install.sh README.md tools/
COPY package package
RUN tools/install.sh cpu /app/venv \\
    && useradd --create-home --uid 1000 somebody
USER 1000:1000
ENV PATH=/app/venv/bin:$PATH CACHE=4
EXPOSE 8000
HEALTHCHECK --interval=10s --retries=3 \\
    CMD ["python", "-c", "ask('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["serve", "/model"]
"""
INSTALL = """#!/bin/sh
mkdir -p "$2/bin" && env > "$2/env" && pwd > "$2/pwd" && python3 --version > "$2/python" || exit 1
printf '#!/bin/sh\\n' > "$2/bin/serve" && chmod +x "$2/bin/serve"
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What the Dockerfile copies from."""
    folder = tmp_path / "repo"
    for name, text in {"tools/install.sh": INSTALL, "README.md": "read", "package/a/b.py": "x = 1"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "tools/install.sh").chmod(0o755)
    (folder / "package/__pycache__").mkdir()
    return folder


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "Dockerfile.x"
    path.write_text(text)
    return path


@pytest.fixture
def followed(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Image, list[str]]:
    """The image of WHOLE, and what was said about its steps."""
    monkeypatch.setenv("SECRET_OF_THIS_SHELL", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PIP_TIMEOUT", "7")
    said: list[str] = []
    image = Image(repo, tmp_path / "out", said.append)
    image.follow(read(written(tmp_path, WHOLE)))
    return image, said


def test_the_steps_are_taken_in_a_folder_in_place_of_workdir(followed: tuple[Image, list[str]]):
    image, _ = followed
    assert (image.app / "tools/README.md").read_text() == "read"
    assert (image.app / "package/a/b.py").exists()
    assert not (image.app / "package/__pycache__").exists()
    assert (image.app / "venv/pwd").read_text().strip() == str(image.app)
    assert (image.app / "venv/python").read_text().startswith(f"Python {PYTHON}")
    assert image.env["PATH"].startswith(f"{image.app}/venv/bin:{image.out}/from:")
    assert image.env["CACHE"] == "4"
    assert image.commands["serve"] == ["serve", "/model"]
    assert image.commands["health"][:2] == ["python", "-c"]
    installed = image_check.as_installed(image)
    assert (installed.venv, installed.cwd) == (image.app / "venv", image.app)


def test_commands_see_nothing_of_this_shell(followed: tuple[Image, list[str]]):
    image, _ = followed
    names = {line.split("=")[0] for line in (image.app / "venv/env").read_text().splitlines()}
    assert {"PATH", "HOME", "PIP_NO_CACHE_DIR", "PIP_TIMEOUT"} <= names
    allowed = {"PATH", "HOME", "PWD", "OLDPWD", "SHLVL", "_"}
    assert all(name in allowed or image_check._FROM_MACHINE.fullmatch(name) for name in names)
    assert not {"SECRET_OF_THIS_SHELL", "PYTHONPATH"} & names


def test_each_step_is_told_as_run_or_as_skipped_with_the_reason(followed: tuple[Image, list[str]]):
    _, said = followed
    assert all(line.startswith(("run   Dockerfile.x:", "skip  Dockerfile.x:")) for line in said)
    text = "\n".join(said)
    for line in (
        f"skip  Dockerfile.x:2 FROM python:{PYTHON}-slim: no engine; ",
        "skip  Dockerfile.x:5 RUN apt-get update: the package lists are the machine's",
        "skip  Dockerfile.x:5 RUN rm -rf /var/lib/apt/lists/*: would remove files of this machine",
        "run   Dockerfile.x:8 WORKDIR /app: ",
        "run   Dockerfile.x:12 RUN tools/install.sh cpu /app/venv: ",
        "skip  Dockerfile.x:12 RUN useradd --create-home --uid 1000 somebody: would make a user",
        "skip  Dockerfile.x:16 EXPOSE 8000: no network of its own",
    ):
        assert line in text
    assert "PIP_TIMEOUT" in text


@pytest.mark.skipif(os.getuid() != 0, reason="only root runs a server as another user")
@pytest.mark.parametrize(("mode", "user"), [(0o755, 1000), (0o700, None)])
def test_the_user_of_the_image_serves_where_it_can_reach_the_python(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, user: int | None
):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        python = Path(name) / "bin" / "python"
        python.parent.mkdir()
        python.write_text("#!/bin/sh\n")
        python.chmod(0o755)
        Path(name).chmod(mode)
        monkeypatch.setattr(image_check, "_find_python", lambda version: str(python))
        out, said = Path(name) / "out", []
        image = Image(repo, out, said.append)
        image.follow([step for step in read(written(tmp_path, WHOLE)) if step.name in ("FROM", "WORKDIR", "USER")])
    assert image.user == user
    assert ("closed to that user" in said[-1]) is (user is None)


def test_a_command_that_fails_ends_the_check(repo: Path, tmp_path: Path):
    (repo / "tools/install.sh").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match=r"Dockerfile\.x:12: `tools/install\.sh cpu /app/venv` ended with exit code 3"):
        Image(repo, tmp_path / "out").follow(read(written(tmp_path, WHOLE)))


@pytest.mark.parametrize(
    ("found", "replacement", "sentence"),
    [
        ("EXPOSE 8000", "ARG X=1", r"x:16: ARG 'X=1': this check does not know the instruction; it knows FROM, RUN"),
        ("EXPOSE 8000", "ADD a b", "x:16: ADD"),
        ("EXPOSE 8000", "CMD ['x']", "x:16: CMD"),
        ("EXPOSE 8000", "FROM python:3.12", "once in a file"),
        ("EXPOSE 8000", "RUN curl http://x", "does not know 'curl'"),
        ("EXPOSE 8000", "RUN tools/install.sh | tee log", "plain words"),
        ("EXPOSE 8000", "RUN --mount=type=cache,target=/x tools/install.sh", "plain words"),
        ("EXPOSE 8000", 'ENV A="b c"', "NAME=VALUE without quotes"),
        ("EXPOSE 8000", "ENV A=$NOWHERE", r"\$NOWHERE is not set before"),
        ("EXPOSE 8000", "COPY --from=other a b", "without options"),
        ("EXPOSE 8000", "COPY package /etc", "into WORKDIR alone"),
        ("EXPOSE 8000", "COPY nothing here", "nothing is not in the repository"),
        ("EXPOSE 8000", "COPY README.md tools/install.sh there", "need a folder"),
        ("WORKDIR /app", "WORKDIR app", "an absolute path"),
        ("WORKDIR /app", "EXPOSE 1", "expected WORKDIR before it"),
        ("USER 1000:1000", "USER somebody", "UID or UID:UID"),
        ('["serve", "/model"]', "serve /model", "ENTRYPOINT"),
        ("# Serves.", "# escape=`", "no parser directives"),
        (f"python:{PYTHON}-slim", "debian:12", "Python's own images"),
        (f"python:{PYTHON}-slim", "python:2.1-slim", r"found no Python 2\.1 on this machine"),
        ('"/model"]\n', '"/model"] \\\n', "behind the file's end"),
        (f"FROM python:{PYTHON}-slim", "", "expected FROM first"),
    ],
)
def test_what_it_does_not_know_is_refused(repo: Path, tmp_path: Path, found: str, replacement: str, sentence: str):
    assert found in WHOLE
    path = written(tmp_path, WHOLE.replace(found, replacement, 1))
    with pytest.raises(DockerfileError, match=sentence):
        Image(repo, tmp_path / "out", lambda _: None).follow(read(path))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_images_have_only_what_it_knows(flavor: str):
    steps = read(REPO / "docker" / f"Dockerfile.{flavor}")
    assert [step.name for step in steps][-1] == "ENTRYPOINT"
    copied = [name for step in steps if step.name == "COPY" for name in step.copied()[0]]
    own = [part.split()[0] for step in steps if step.name == "RUN" for part in step.commands()]
    assert set(own) - set(copied) == {"apt-get", "rm", "useradd"}


def test_wrong_arguments_are_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "tests.packaging.image_check", "--flavor", "tpu"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--flavor: invalid choice: 'tpu'" in done.stderr
