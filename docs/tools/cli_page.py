"""Write docs/cli.md from the commands themselves: ``python docs/tools/cli_page.py``. A test compares the two."""

import re
from pathlib import Path

import click

from compress_tools.cli.commands import cli

PAGE = Path(__file__).resolve().parents[1] / "cli.md"
HEAD = """# Commands

Written from the commands themselves by `python docs/tools/cli_page.py`; edit the options' help, not this page.

Results go to stdout (`--json` for JSON), progress and errors to stderr.
Exit codes: 0 ok, 2 usage or options, 3 model family, 4 checkpoint or file, 5 numerics, 1 a bug, 130 interrupted.
"""


def cli_page() -> str:
    """The page: each command with its usage, its text, and a table of its options."""
    parts = [HEAD]
    with click.Context(cli, info_name="resmoe") as root:
        for name in cli.list_commands(root):
            command = cli.get_command(root, name)
            if command is not None and not command.hidden:
                parts.append(command_section(command, click.Context(command, parent=root, info_name=name)))
    return "\n".join(parts)


def command_section(command: click.Command, context: click.Context) -> str:
    """One command as Markdown."""
    usage = " ".join(["resmoe", str(context.info_name), *command.collect_usage_pieces(context)])
    lines = [f"## resmoe {context.info_name}", "", "```text", usage, "```", "", *paragraphs(command.help or "")]
    options = [
        option
        for option in command.get_params(context)
        if isinstance(option, click.Option) and not option.hidden and "--help" not in option.opts
    ]
    lines += ["| option | |", "|---|---|"]
    for option in options:
        record = option.get_help_record(context)
        if record is not None:
            lines.append(f"| {code(record[0])} | {cell(record[1])} |")
    return "\n".join(lines) + "\n"


def paragraphs(text: str) -> list[str]:
    """A command's help text; what click prints as it stands (after a backspace) becomes a block of text."""
    lines = []
    for block in re.sub(r"\n +", "\n", text.strip()).split("\n\n"):
        if block.startswith("\b"):
            lines += ["```text", *block.splitlines()[1:], "```", ""]
        else:
            lines += [block, ""]
    return lines


def code(text: str) -> str:
    """Inline code inside of a table."""
    return "`" + text.replace("|", "\\|") + "`"


def cell(text: str) -> str:
    """Text inside of a table, where ``|``, ``<`` and line ends have a meaning."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
