"""``python -m compress_tools``: the ``resmoe`` command."""

from compress_tools.cli.commands import main

main()
