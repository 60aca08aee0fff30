"""``python -m compress_tools``: the ``resmoe`` command."""

from compress_tools.cli import main

main()
