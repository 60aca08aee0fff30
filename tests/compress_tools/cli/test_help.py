"""Help: at once, complete, and of one form."""

import subprocess
import sys

import click
import pytest

from compress_tools.cli.commands import cli
from compress_tools.cli.options import ConfigCommand, config_options
from compress_tools.config import CompressionConfig
from compress_tools.evaluation.config import TextConfig
from compress_tools.planner.config import PlannerConfig
from compress_tools.probe.config import ProbeConfig

HEAVY = {"torch", "transformers", "scipy", "numpy", "matplotlib", "safetensors", "rich", "vllm"}
COMMANDS = sorted(cli.commands)
CONFIGS = [CompressionConfig, PlannerConfig, ProbeConfig, TextConfig]


def imported(*words: str) -> tuple[set[str], str]:
    """Top-level modules that a run of the command imports, and its stdout."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "compress_tools", *words], capture_output=True, text=True, check=True
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in names
    return {name.partition(".")[0] for name in names}, done.stdout


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"]], ids=lambda words: words[0])
def test_the_commands_own_help_imports_click_alone(words: list[str]) -> None:
    modules, stdout = imported(*words)
    assert stdout
    assert not modules & (HEAVY | {"pydantic", "yaml"})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_imports_no_tensors(command: str) -> None:
    modules, stdout = imported(command, "--help")
    assert "--help" in stdout
    assert not modules & HEAVY


def test_help_names_the_exit_codes() -> None:
    text = cli.get_help(click.Context(cli))
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "130"):
        assert f"\n    {code}" in text


@pytest.mark.parametrize(
    "config", [CompressionConfig, PlannerConfig, ProbeConfig, TextConfig], ids=lambda c: c.__name__
)
def test_every_field_is_an_option_that_says_its_default(config: type[CompressionConfig]) -> None:
    options = {option.name: option for option in config_options(config)}
    assert list(options) == list(config.model_fields)
    for name, field in config.model_fields.items():
        assert options[name].help.startswith(field.description)
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert options[name].help.endswith(f"[default: {field.default}]")


def test_kinds_of_options() -> None:
    options = {option.name: option for config in (CompressionConfig, PlannerConfig, ProbeConfig, TextConfig)
               for option in config_options(config)}  # fmt: skip
    assert options["bits"].type.choices == (1, 2, 3, 4, 8)
    assert options["uniform"].is_flag
    assert (options["bytes_ratio"].multiple, options["bytes_ratio"].type) == (True, click.FLOAT)
    assert (options["experts"].multiple, options["experts"].type) == (False, click.INT)
    assert options["text"].type == click.STRING


def test_what_is_not_given_is_told_from_a_default() -> None:
    seen: dict[str, object] = {}

    def keep(**values: object) -> None:
        seen.clear()
        seen.update((name, value) for name, value in values.items() if value is not None)

    command = ConfigCommand("x", configs=lambda: (CompressionConfig, PlannerConfig), callback=keep)
    command.main(["--bits", "4"], standalone_mode=False)
    assert seen == {"bits": 4}
    command.main(["--uniform"], standalone_mode=False)
    assert seen == {"uniform": True}
