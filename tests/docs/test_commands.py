"""Every command of every page: run here, or its block says why not; and what the text names exists."""

import importlib.util
import re
import runpy
import shutil
import sys
from pathlib import Path

import click
import pytest

from benchmarks.models.reference_models.build import HELDOUT_FILE
from benchmarks.serving.server import VllmServer
from compress_tools.cli.commands import cli
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.ray_cluster import cli as ray_command
from tests.docs.pages import LANGUAGES, PAGES, REPO, Block, Command, blocks_of, commands_of, inline_code, name

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [command for block in BLOCKS if block.language in ("bash", "console") for command in commands_of(block)]
# What a page takes for granted that a page before it has made.
GIVEN = {"docs/serving.md": ("DST",), "docs/format.md": ("DST",)}
PORT = "localhost:8000"
# Options of other programs, vLLM's above all, that pages speak of.
FOREIGN_OPTIONS = {
    "--all2all-backend", "--api-key", "--enable-eplb", "--enable-lora", "--enforce-eager", "--tensor-parallel-size",
    "--load-format", "--trust-remote-code",
    "--lora-modules", "--lora-target-modules", "--speculative-config",
    "--port", "--host", "--local-dir", "--extra-index-url", "--profile", "--rm",
}  # fmt: skip


def running(block: Block) -> list[Command]:
    """The commands of a block that are run."""
    return [command for command in commands_of(block) if command.mark is None] if block.language == "bash" else []


def serving(block: Block) -> bool:
    """The block starts a server, and asks it."""
    return any(command.words[:2] == ("vllm", "serve") for command in running(block))


@pytest.fixture(scope="module")
def checkpoints(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What pages may find in their directory: a trained tiny model, and the same compressed."""
    original, _ = trained
    small = tmp_path_factory.mktemp("docs") / "DST"
    compress(original, small, make_config(method="low-rank"))
    return {"SRC": original, "DST": small}


def directory_of(page: str, checkpoints: dict[str, Path], folder: Path) -> Path:
    """The directory in which a page is followed."""
    for given in ("SRC", *GIVEN.get(page, ())):
        shutil.copytree(checkpoints[given], folder / given)
    # "Any text file will do"; a short one.
    text = (checkpoints["SRC"] / HELDOUT_FILE).read_text()
    (folder / "heldout.txt").write_text(text[:2000])
    (folder / "calibration.txt").write_text(text[2000:4000])
    return folder


def run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command as it stands, in the current directory; Python's in this process, which has torch loaded."""
    for variable, value in command.env.items():
        monkeypatch.setenv(variable, value)
    program, *arguments = command.words
    if program == "export":
        for setting in arguments:
            monkeypatch.setenv(*setting.split("=", 1))
    elif program == "resmoe":
        run_module(command, "compress_tools", arguments, monkeypatch)
    elif program == "python" and arguments[0] == "-m":
        run_module(command, arguments[1], arguments[2:], monkeypatch)
    elif program == "python" and arguments[0] == "-c":
        exec(compile(arguments[1], command.where, "exec"), {})
    else:
        pytest.fail(f"{command}\nis a command that this test can't run: run it here, or mark its block")


def run_module(command: Command, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python -m`` does."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    assert not code, f"{command} ended with exit code {code}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_fences_say_what_they_hold(block: Block):
    assert block.language in LANGUAGES, f"{block.where}: ```{block.language}; expected one of {', '.join(LANGUAGES)}"


FOLLOWED = [
    name(page)
    for page in PAGES
    if any(running(block) or block.language == "python" for block in BLOCKS if block.page == page)
]


@pytest.mark.parametrize("page", FOLLOWED)
def test_page_can_be_followed(page: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(directory_of(page, checkpoints, tmp_path))
    ran = 0
    typed: dict[str, object] = {}
    for block in blocks_of(REPO / page):
        if block.language == "python":
            run_python(block, typed)
            ran += 1
        for command in running(block):
            if command.words[:2] == ("vllm", "serve"):
                # The rest of the block asks the server: test_served.
                break
            run(command, monkeypatch)
            ran += 1
    assert ran or any(serving(block) for block in blocks_of(REPO / page))


def run_python(block: Block, typed: dict[str, object]) -> None:
    """A Python block runs, after those before it, or is an excerpt: its lines stand in the repository's own code."""
    text = "\n".join(block.lines)
    if not any(text in path.read_text(encoding="utf-8") for path in repository_files() if path.suffix == ".py"):
        exec(compile(text, block.where, "exec"), typed)


@pytest.mark.vllm
@pytest.mark.slow
def test_served(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One server and each distinct question of the pages; port and cache size are not the pages'."""
    asked: dict[tuple[str, ...], Command] = {}
    servers: set[tuple[str, ...]] = set()
    for block in filter(serving, BLOCKS):
        commands = running(block)
        first = next(i for i, command in enumerate(commands) if command.words[:2] == ("vllm", "serve"))
        assert commands[first].env == {"VLLM_CPU_KVCACHE_SPACE": "4"}, commands[first]
        servers.add(commands[first].words)
        asked |= {command.words: command for command in commands[first + 1 :]}
    assert servers == {("vllm", "serve", "DST")}
    assert asked
    monkeypatch.chdir(directory_of("docs/serving.md", checkpoints, tmp_path))
    with VllmServer("DST", env={"VLLM_CPU_KVCACHE_SPACE": "1"}, log_path=tmp_path / "server.log") as server:
        # told before the server calls itself healthy
        assert re.search(r"resmoe [\d.]+, format 2: 2 compressed MoE layers", server.log)
        assert re.search(
            r"kernel for experts of I 64, H 64 in bfloat16: (C\+\+, .*loaded in \d|plain torch: )", server.log
        )
        for command in asked.values():
            words = tuple(word.replace(PORT, f"127.0.0.1:{server.port}") for word in command.words)
            assert words != command.words
            run(Command(command.where, words, command.env, None), monkeypatch)


def resmoe_usage(words: tuple[str, ...]) -> None:
    """Raise click's UsageError where the command would."""
    parent = click.Context(cli, info_name="resmoe")
    _, verb, arguments = cli.resolve_command(parent, list(words))
    assert verb is not None
    verb.make_context(words[0], list(arguments), parent)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.mark is not None], ids=str)
def test_marked_commands_name_what_exists(command: Command):
    if (test := re.search(r"tested by (\S+)", command.mark or "")) is not None:
        assert (REPO / test[1]).exists(), command
    program, *arguments = command.words
    if program in ("python", "resmoe", "vllm"):
        assert {word for word in arguments if word.startswith("--")} <= known_options(), command
    if program == "resmoe":
        resmoe_usage(tuple(arguments)) if "--version" not in arguments else None
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (REPO / "Makefile").read_text(), re.MULTILINE), command
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, command
        if arguments[1] == "compress_tools.ray_cluster":
            ray_command.make_context("ray_cluster", arguments[2:])
    elif program == "docker" and "-f" in arguments:
        assert (REPO / arguments[arguments.index("-f") + 1]).is_file(), command


def known_options() -> set[str]:
    """Every option of the commands and benchmarks of this repository."""
    sources = [
        *(REPO / "benchmarks").rglob("*.py"),
        *(REPO / "docker").glob("*.sh"),
        REPO / "compress_tools/ray_cluster.py",
    ]
    found = {option for path in sources for option in re.findall(r"(--[a-z][\w-]+)", path.read_text(encoding="utf-8"))}
    for command in (cli, *cli.commands.values(), ray_command):
        found |= {
            option
            for parameter in command.get_params(click.Context(command))
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
    return found | {"--help", "--version"} | FOREIGN_OPTIONS


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) != "CHANGELOG.md"], ids=name)
def test_text_names_what_exists(page: Path):
    # The changelog may name what was.
    files = [path.relative_to(REPO).as_posix() for path in repository_files()]
    options = known_options()
    for code in inline_code(page):
        if "CODER" in code:
            continue  # a placeholder of adding-a-coder.md
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", code):
            assert option in options, f"{name(page)}: `{code}`: no command has {option}"
        if (verb := re.match(r"resmoe ([a-z]+)\b(?!')", code)) is not None:
            assert verb[1] in cli.commands, f"{name(page)}: `{code}`"
        if (module := re.match(r"python -m ([\w.]+)", code)) is not None and "NAME" not in code:
            assert importlib.util.find_spec(module[1]) is not None, f"{name(page)}: `{code}`"
        if (
            re.fullmatch(r"(compress_tools|resmoe_vllm|benchmarks|tests|docs|docker|\.ci)/[\w./-]+", code)
            and "CODER" not in code
        ):
            assert (REPO / code).exists(), f"{name(page)}: `{code}` does not exist"
        elif re.fullmatch(r"[\w./-]+\.(py|cpp|h|sh|toml|yaml)", code) and code not in ELSEWHERE:
            assert any(file == code or file.endswith("/" + code) for file in files), f"{name(page)}: `{code}`"


# Files that commands write, and those of worked examples: not files of the repository.
ELSEWHERE = ("plan.yaml", "resmoe_plan.yaml", "format/parts/sign.py", "residuals/sign.py")


def repository_files() -> list[Path]:
    """Files of the repository, without what is built or installed into it."""
    folders = ("benchmarks", "compress_tools", "docker", "docs", "resmoe_vllm", "tests")
    inside = [path for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()]
    return [path for path in (*REPO.glob("*"), *inside) if path.is_file()]
