"""`make release-check`: the wheel in an empty environment compresses and serves, and nothing of this clone helps it.

Builds the sdist, the wheel from the sdist, and an environment of the pins and that wheel (docker/install.sh --wheel).

    python -m tests.packaging.release_check [--out DIR]
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
START_S = 900
API_KEY = "release-check"
# Runs in the new environment: what an application does.
ASK = """
import math, sys
import httpx
from openai import AuthenticationError, OpenAI
base, model, key = sys.argv[1:]
client = OpenAI(base_url=base + "/v1", api_key=key, max_retries=0)
answer = client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0, logprobs=0).choices[0]
assert len(answer.logprobs.token_logprobs) == 8 and all(map(math.isfinite, answer.logprobs.token_logprobs)), answer
chunks = list(client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0, stream=True))
assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.text, (chunks, answer)
try:
    OpenAI(base_url=base + "/v1", api_key="wrong", max_retries=0).models.list()
except AuthenticationError:
    print(f"2 completions of 8 tokens, {len(chunks)} chunks, a wrong key refused")
else:
    sys.exit("a wrong key was let in")
# docs/operations.md and SECURITY.md say which paths vLLM's key does not guard; a generation is among them.
asked = {"model": model, "prompt": "import os", "max_tokens": 2}
for path, body, expected in (
    ("/v1/models", None, 401), ("/v1/completions", asked, 401), ("/inference/v1/generate", asked, 401),
    ("/health", None, 200), ("/metrics", None, 200), ("/version", None, 200), ("/load", None, 200),
    ("/tokenize", asked, 200), ("/invocations", asked, 200),
):
    found = httpx.request("POST" if body else "GET", base + path, json=body, follow_redirects=True, timeout=60)
    print(f"{path} without a key: {found.status_code}")
    if found.status_code != expected:
        sys.exit(f"{path} without a key: {found.status_code}, expected {expected}: {found.text[:300]}")
"""
WHERE = """
import importlib.metadata, importlib.util, compress_tools, resmoe_vllm
print(compress_tools.__file__, resmoe_vllm.__file__)
own = {file.parts[0] for file in importlib.metadata.files("resmoe")}
assert not own & {"benchmarks", "tests"}, own
# another distribution may bring packages of these names, into the environment
for name in ("benchmarks", "tests"):
    found = importlib.util.find_spec(name)
    print(*(found.submodule_search_locations or [] if found else []), sep="\\n")
"""


@dataclass(frozen=True)
class Installed:
    """An environment that is to serve.

    Attributes:
        venv: its folder.
        serve: the command that serves ``/model``.
        health: the command that says whether it does; None: ask /health.
        env: all variables of its commands but HOME; none: PATH, and one thread.
        user: uid and gid that the server runs as; None: these.
        cwd: where the server starts; None: in its HOME.
    """

    venv: Path
    serve: Sequence[str] = ("vllm", "serve", "/model")
    health: Sequence[str] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: int | None = None
    cwd: Path | None = None


def main() -> None:
    """Build, install, compress, serve, ask; ends with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.release_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPO / "build" / "release", help="folder of all that is made")
    args = parser.parse_args()
    begun, out = time.perf_counter(), args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "work").mkdir(parents=True)
    model = reference_model(out)
    installed = from_wheel(out)
    check_path(installed, out)
    resmoe(installed, out, "compress", str(model), "small")
    resmoe(installed, out, "verify", "small")
    serve(installed, out)
    print(f"passed after {(time.perf_counter() - begun) / 60:.1f} minutes")


def from_wheel(out: Path) -> Installed:
    """The sdist, the wheel made from it, and an environment with that wheel."""
    source = out / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "demo-output", ".*_cache")
    shutil.copytree(REPO, source, ignore=ignored)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    _run([sys.executable, "-c", build, str(out)], cwd=source, quiet=True)
    (sdist,) = out.glob("resmoe-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(out), str(sdist)]
    _run(pip, cwd=out)
    (wheel,) = out.glob("resmoe-*.whl")
    with tarfile.open(sdist) as packed:
        files = len(packed.getnames())
    print(f"{sdist.name}: {files} files; {wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB")
    _run([str(REPO / "docker/install.sh"), "cpu", str(out / "venv"), "--wheel", str(wheel)], cwd=out)
    return Installed(out / "venv")


def reference_model(out: Path) -> Path:
    """A model to compress, trained by this clone in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models.reference_models", "--preset", "tiny"]
    _run([*command, "--context-length", "128", "--out", str(out / "model")], cwd=REPO, quiet=True)
    return out / "model"


def check_path(installed: Installed, out: Path) -> None:
    """The packages are imported from the environment, and nothing of this clone is."""
    done = _run([str(installed.venv / "bin/python"), "-c", WHERE], cwd=out / "work", env=_clean(installed, out))
    for place in done.split():
        if not Path(place).is_relative_to(installed.venv):
            sys.exit(f"{place} is not in {installed.venv}")


def resmoe(installed: Installed, out: Path, *words: str) -> None:
    """The environment's own `resmoe`, in OUT/work."""
    command = [str(installed.venv / "bin/resmoe"), *words]
    _run(command, cwd=out / "work", env=_clean(installed, out), quiet=True)
    print(f"$ resmoe {' '.join(words)}")


def serve(installed: Installed, out: Path) -> None:
    """Serve OUT/work/small, wait until it is healthy, ask."""
    home = out / "home"
    home.mkdir(exist_ok=True)
    if installed.user is not None:
        os.chown(home, installed.user, installed.user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = str(out / "work" / "small")
    command = [model if word == "/model" else word for word in installed.serve]
    command[0] = str(installed.venv / "bin" / command[0])
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **_clean(installed, out), "VLLM_API_KEY": API_KEY}
    as_user = {} if installed.user is None else {"user": installed.user, "group": installed.user, "extra_groups": []}
    base, log = f"http://127.0.0.1:{port}", out / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], cwd=installed.cwd or home, env=env, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, **as_user,
        )  # fmt: skip
    try:
        begun = time.perf_counter()
        _wait(installed, server, base, env, log)
        print(f"$ vllm serve small: healthy after {time.perf_counter() - begun:.0f} s")
        told = re.findall(
            r"resmoe [\d.]+, format \d: \d+ compressed MoE layers|kernel for experts of .*", log.read_text()
        )
        if len(told) != 2:
            sys.exit(f"{log}: the start's block of resmoe is not there")
        print("\n".join(told))
        python = str(installed.venv / "bin/python")
        print(_run([python, "-c", ASK, base, model, API_KEY], cwd=home, env=env).strip())
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)


def _wait(installed: Installed, server: subprocess.Popen, base: str, env: Mapping[str, str], log: Path) -> None:
    asked = installed.health or [
        "python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)",
    ]  # fmt: skip
    command = [word.replace("http://127.0.0.1:8000", base) for word in asked]
    command[0] = str(installed.venv / "bin" / command[0])
    until = time.monotonic() + START_S
    while subprocess.run(command, env=env, capture_output=True).returncode:
        if server.poll() is not None or time.monotonic() > until:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            sys.exit(f"the server is not healthy (exit code {server.poll()}); the end of {log}:\n{tail}")
        time.sleep(2)


def _clean(installed: Installed, out: Path) -> dict[str, str]:
    """An environment without anything of this one's but the search path for compilers."""
    path = f"{installed.venv / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    return {**(installed.env or {"PATH": path, "OMP_NUM_THREADS": "1"}), "HOME": str(out / "home")}


def _run(command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, *, quiet: bool = False) -> str:
    """A command's output; the check ends where the command fails."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True
    )
    if done.returncode:
        sys.exit(f"`{shlex.join(command)}` ended with exit code {done.returncode}\n{done.stdout}{done.stderr or ''}")
    return done.stdout


if __name__ == "__main__":
    main()
