"""The `resmoe` command: options in, results and exit codes out."""
