"""`make image-check`: the steps of a Dockerfile without a container engine, in an environment with nothing in it.

A folder stands for WORKDIR, this machine's Python for the base image's. Each command gets the variables that the
Dockerfile sets, PATH and HOME, and where packages come from (pip's and proxies' variables of this machine); nothing
else. What would change the machine is skipped, and said so; an instruction that this check does not know is refused.
Then the environment compresses, and behind the image's entry point and health check, as its user, it serves.

    python -m tests.packaging.image_check [--flavor cpu|cuda] [--out DIR]
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.packaging import release_check
from tests.packaging.dockerfile import DockerfileError, Instruction, read
from tests.packaging.release_check import REPO, Installed

FLAVORS = ("cpu", "cuda")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where packages come from is the machine's, as a proxy is an engine's.
_FROM_MACHINE = re.compile(r"PIP_\w+|\w+_proxy|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE", re.IGNORECASE)
# What no CPU build of torch can stand in for.
TORCH_CUDA = "import torch; print(torch.__version__, torch.version.cuda)"
REGISTER = "import resmoe_vllm; resmoe_vllm.register(); print('the plugin registers')"


@dataclass
class Image:
    """What the steps so far have made.

    Attributes:
        repo: where COPY takes from.
        out: folder of everything.
        say: prints a line on a step.
        env: variables.
        workdir: WORKDIR as the Dockerfile calls it.
        user: uid that serves; None: the one that runs this.
        commands: by ENTRYPOINT and HEALTHCHECK.
    """

    repo: Path
    out: Path
    say: Callable[[str], None] = print
    env: dict[str, str] = field(default_factory=dict)
    workdir: str | None = None
    user: int | None = None
    commands: dict[str, list[str]] = field(default_factory=dict)

    @property
    def app(self) -> Path:
        """The folder that stands for WORKDIR."""
        return self.out / "app"

    def follow(self, steps: list[Instruction]) -> None:
        """Take the steps, in order.

        Raises:
            DockerfileError: one that can't be followed here.
            SystemExit: one that fails; says which.
        """
        for step in steps:
            getattr(self, f"_{step.name.lower()}")(step)

    def here(self, text: str) -> str:
        """A text of the Dockerfile with this machine's folder in place of WORKDIR."""
        if self.workdir is None:
            return text
        return re.sub(rf"(?<![\w/.-]){re.escape(self.workdir)}(?![\w.-])", str(self.app), text)

    def _did(self, step: Instruction, what: str = "") -> None:
        self.say(f"run   {step.where} {step}{what and ': ' + what}")

    def _skipped(self, step: Instruction, what: str, why: str) -> None:
        self.say(f"skip  {step.where} {step.name} {what}: {why}")

    def _from(self, step: Instruction) -> None:
        wanted = step.python()
        python = _find_python(wanted)
        if python is None:
            raise step.refused(f"found no Python {wanted} on this machine")
        commands = self.out / "from"
        commands.mkdir(parents=True)
        for name in ("python3", "python"):
            (commands / name).symlink_to(python)
        self.env = {"PATH": f"{commands}:{SYSTEM_PATH}", "HOME": str(self.out / "root")}
        self._skipped(step, step.rest, f"no engine; {python} stands in")

    def _workdir(self, step: Instruction) -> None:
        self.workdir = step.rest
        self.app.mkdir(parents=True)
        self._did(step, str(self.app))

    def _env(self, step: Instruction) -> None:
        before = dict(self.env)
        for name, value in step.settings().items():
            value = self.here(value)
            for known in re.findall(r"\$\{?(\w+)\}?", value):
                if known not in before:
                    raise step.refused(f"${known} is not set before")
            self.env[name] = re.sub(r"\$\{?(\w+)\}?", lambda found: before[found[1]], value)
        self._did(step)

    def _copy(self, step: Instruction) -> None:
        sources, target = step.copied()
        self._inside_workdir(step)
        if len(sources) > 1 and not target.endswith("/"):
            raise step.refused("several sources need a folder as target, with / at its end")
        for name in sources:
            source = self.repo / name
            if not source.exists():
                raise step.refused(f"{name} is not in the repository")
            place = self.app / target
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = place / source.name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, place)
        self._did(step)

    def _run(self, step: Instruction) -> None:
        for command in step.commands():
            words = command.split()
            if words[:2] == ["apt-get", "update"]:
                self._skipped(step, command, "the package lists are the machine's")
            elif words[:2] == ["apt-get", "install"]:
                self._simulate_apt(step, command)
            elif words[0] == "useradd":
                self._skipped(step, command, "would make a user of this machine; a server is run by uid alone")
            elif words[0] == "rm" and all(word.startswith(("-", "/")) for word in words[1:]):
                self._skipped(step, command, "would remove files of this machine")
            elif (self.app / words[0]).is_file():
                self._inside_workdir(step)
                self._execute(step, command)
            else:
                raise step.refused(f"this check does not know {words[0]!r}, which is not a file of the image either")

    def _simulate_apt(self, step: Instruction, command: str) -> None:
        if shutil.which("apt-get", path=SYSTEM_PATH) is None:
            self._skipped(step, command, "this machine has no apt-get")
            return
        simulated = ["apt-get", "--simulate", *command.split()[1:]]
        done = subprocess.run(simulated, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{step.where}: `{shlex.join(simulated)}` ended with exit code {done.returncode}\n{done.stderr}")
        self._skipped(step, command, "only simulated: apt finds the packages, and the machine stays as it is")

    def _execute(self, step: Instruction, command: str) -> None:
        begun = time.perf_counter()
        machine = {name: value for name, value in os.environ.items() if _FROM_MACHINE.fullmatch(name)}
        Path(self.env["HOME"]).mkdir(exist_ok=True)
        done = subprocess.run(["/bin/sh", "-c", self.here(command)], cwd=self.app, env={**machine, **self.env})
        if done.returncode:
            sys.exit(f"{step.where}: `{command}` ended with exit code {done.returncode}")
        names = f", given {', '.join(sorted(machine))} of this machine" if machine else ""
        self.say(f"run   {step.where} RUN {command}: {time.perf_counter() - begun:.0f} s{names}")

    def _user(self, step: Instruction) -> None:
        if os.getuid() != 0:
            self._skipped(step, step.rest, f"not root, so the server runs as uid {os.getuid()}")
        elif not _reachable(python := self.out / "from" / "python3", step.uid()):
            why = f"{python.resolve()} or a folder of {self.app} is closed to that user, so the server runs as uid 0"
            self._skipped(step, step.rest, why)
        else:
            self.user = step.uid()
            self._did(step, "of the server")

    def _expose(self, step: Instruction) -> None:
        self._skipped(step, step.rest, "no network of its own; the server takes a free port")

    def _healthcheck(self, step: Instruction) -> None:
        self.commands["health"] = step.words()
        self._did(step, "asked until the server is healthy")

    def _entrypoint(self, step: Instruction) -> None:
        self.commands["serve"] = step.words()

    def _inside_workdir(self, step: Instruction) -> None:
        if self.workdir is None:
            raise step.refused("expected WORKDIR before it: this check writes nowhere else")


def _find_python(version: str) -> str | None:
    """A Python of that version, not one of a virtual environment."""
    same = f"{sys.version_info.major}.{sys.version_info.minor}" == version
    candidates = [str(Path(sys.base_prefix) / "bin" / f"python{version}")] if same else []
    for found in [*candidates, shutil.which(f"python{version}", path=SYSTEM_PATH)]:
        if found and os.access(found, os.X_OK):
            return os.path.realpath(found)
    return None


def _reachable(python: Path, uid: int) -> bool:
    """Another user can run a program of this machine."""
    try:
        done = subprocess.run([python, "-c", ""], env={}, user=uid, group=uid, extra_groups=[], capture_output=True)
    except PermissionError:
        return False
    return done.returncode == 0


def check(flavor: str, out: Path) -> None:
    """Follow one Dockerfile to its end."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "work").mkdir(parents=True)
    steps = read(REPO / "docker" / f"Dockerfile.{flavor}")
    image = Image(REPO, out)
    image.follow(steps)
    (entry,) = [step for step in steps if step.name == "ENTRYPOINT"]
    installed = as_installed(image)
    release_check.check_path(installed, out)
    model = release_check.reference_model(out)
    release_check.resmoe(installed, out, "compress", str(model), "small")
    release_check.resmoe(installed, out, "verify", "small")
    if flavor == "cuda":
        _check_cuda(image, entry)
    if flavor == "cuda" and shutil.which("nvidia-smi") is None:
        print(f"skip  {entry.where} {entry}: needs an NVIDIA GPU")
        return
    print(f"run   {entry.where} {entry}")
    release_check.serve(installed, out)


def as_installed(image: Image) -> Installed:
    """What is to be checked of an image: its environment's commands are those that its own PATH finds."""
    found = shutil.which(image.commands["serve"][0], path=image.env["PATH"])
    if found is None or not Path(found).is_relative_to(image.app):
        sys.exit(f"ENTRYPOINT: PATH finds {found} for {image.commands['serve'][0]!r}, expected a file of the image")
    return Installed(Path(found).parents[1], env=image.env, user=image.user, cwd=image.app, **image.commands)


def _check_cuda(image: Image, entry: Instruction) -> None:
    for code in (TORCH_CUDA, REGISTER):
        done = _output(["python", "-c", code], image.env)
        print(f"$ python -c {code.split(';')[0]!r}...: {done}")
        if code == TORCH_CUDA and done.endswith("None"):
            sys.exit(f"{entry.where}: torch is a CPU build, of an index that this machine's pip prefers")


def _output(command: list[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{shlex.join(command)}` ended with exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def main() -> None:
    """Follow both, or the one asked for; ends with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.image_check", description=__doc__)
    parser.add_argument("--flavor", choices=FLAVORS, help="one Dockerfile alone")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "image", help="folder of all that is made")
    args = parser.parse_args()
    for flavor in [args.flavor] if args.flavor else FLAVORS:
        begun = time.perf_counter()
        print(f"docker/Dockerfile.{flavor}", flush=True)
        try:
            check(flavor, args.out.resolve() / flavor)
        except DockerfileError as err:
            sys.exit(str(err))
        print(f"passed after {(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
