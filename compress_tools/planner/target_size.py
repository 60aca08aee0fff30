"""A budget said as the size of all weight files, as the share of the experts' bytes that the planner plans for."""

from compress_tools.errors import ConfigError
from compress_tools.output.target import CompressionTarget
from compress_tools.planner.config import PlannerConfig, parse_size
from compress_tools.progress.text import human_bytes

# What a shard's header takes for one tensor: its name, dtype, shape and place.
HEADER_BYTES = 200


def as_ratio(request: PlannerConfig, target: CompressionTarget) -> PlannerConfig:
    """A size of all weight files as a share of the experts' bytes; a request that names a share as it is.

    Args:
        request: what is asked.
        target: any target of the source, for its sizes.
    Raises:
        ConfigError: all but the experts takes more, or the model is no larger.
    """
    if request.target_size is None:
        return request
    asked = parse_size(request.target_size)
    names = sum(len(shard.tensors) for shard in target.shards)
    headers = HEADER_BYTES * names
    rest, whole = target.other_bytes_after + headers, target.expert_bytes_before + target.other_bytes + headers
    ratio = (asked - rest) / target.expert_bytes_before
    coded = target.fmt.rest is not None
    if ratio >= 1:
        with_codes = f", {human_bytes(target.expert_bytes_before + rest)} with --rest-bits 8" if coded else ""
        raise ConfigError(
            f"--target-size {request.target_size}: the model takes {human_bytes(whole)} as it is{with_codes}"
        )
    if ratio <= 0:
        how = "even in 8-bit codes" if coded else "and is not compressed (--rest-bits 8 halves most of it)"
        raise ConfigError(
            f"--target-size {request.target_size}: all but the experts alone takes {human_bytes(rest)}, {how}; the "
            f"model as it is takes {human_bytes(whole)}"
        )
    return request.model_copy(update={"target_bytes_ratio": ratio})


def ratio_of(request: PlannerConfig) -> float:
    """The share of the experts' bytes that is asked for."""
    if request.target_bytes_ratio is None:
        raise ValueError("a size has to become a ratio first: as_ratio")
    return request.target_bytes_ratio


def asked_for(request: PlannerConfig) -> str:
    """The budget as the command line says it."""
    if request.target_size is not None:
        return f"--target-size {request.target_size}"
    return f"--target-bytes-ratio {request.target_bytes_ratio}"
