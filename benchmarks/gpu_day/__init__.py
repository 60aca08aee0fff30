"""Everything that the first hours on a GPU must show, in one command."""
