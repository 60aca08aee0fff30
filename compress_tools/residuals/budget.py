"""From a share of parameters to counts and ranks. Every ratio here counts parameters, not bytes."""

from math import floor

from compress_tools.errors import ConfigError


def kept_values(num_rows: int, num_columns: int, retain_ratio: float) -> int:
    """Values that pruning keeps of an ``[I, D]`` matrix: ``floor(ratio * I * D)``.

    Raises:
        ConfigError: the ratio keeps nothing.
    """
    count = floor(retain_ratio * num_rows * num_columns)
    if count < 1:
        raise ConfigError(f"--retain-ratio {retain_ratio} keeps no value of a {num_rows} x {num_columns} residual")
    return count


def kept_per_row(num_columns: int, retain_ratio: float) -> int:
    """Values that pruning keeps of each row: ``floor(ratio * H)``.

    Raises:
        ConfigError: the ratio keeps nothing.
    """
    count = floor(retain_ratio * num_columns)
    if count < 1:
        raise ConfigError(f"--retain-ratio {retain_ratio} keeps no value of a row of {num_columns} columns")
    return count


def affordable_rank(num_rows: int, num_columns: int, retain_ratio: float) -> int:
    """Rank whose factors hold ``ratio`` of an ``[I, D]`` matrix's parameters: ``floor(ratio*I*D / (I+D))``.

    A ratio of 1 means "keep everything" for every method, so it gives full rank, which stores more parameters
    than the matrix has.

    Raises:
        ConfigError: the ratio does not pay for rank 1.
    """
    if retain_ratio == 1:
        return min(num_rows, num_columns)
    rank = floor(retain_ratio * num_rows * num_columns / (num_rows + num_columns))
    if rank < 1:
        raise ConfigError(
            f"--retain-ratio {retain_ratio} does not pay for rank 1 of a {num_rows} x {num_columns} residual"
        )
    return rank
