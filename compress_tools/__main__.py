"""The ``resmoe`` command, also as ``python -m compress_tools``."""

import sys

from compress_tools.errors import ConfigError


def main() -> None:
    """Run the command; where only what serves is installed, say what is missing."""
    try:
        from compress_tools.cli.commands import main as run
    except ModuleNotFoundError as err:
        if err.name is None or err.name.split(".")[0] in ("compress_tools", "resmoe_vllm"):
            raise
        print(f"resmoe: the package {err.name} is missing: pip install 'resmoe[compress]'", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    run()


if __name__ == "__main__":
    main()
