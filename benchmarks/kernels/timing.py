"""Milliseconds of a layer's launches in a CUDA graph, and the rate of a copy in the GPU's memory."""

from collections.abc import Callable

import torch
from torch import Tensor


def graph_ms(calls: list[Callable[[], object]], refresh: Callable[[], None], runs: int) -> Tensor:
    """Milliseconds for one call, of each run.

    Args:
        calls: captured one behind the other into one graph; each on weights and routing of its own.
        refresh: puts fresh routing in place before every run, outside of the time.
        runs: replays that count, after three that don't.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        refresh()
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for run in range(runs + 3):
        refresh()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= 3:
            times.append(start.elapsed_time(end) / len(calls))
    return torch.tensor(times)


def copy_gb_s() -> float:
    """GB/s read and written by copying 2 GiB, median of ten."""
    source = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    ms = graph_ms([lambda: target.copy_(source)], lambda: None, 10)
    return 2 * source.nbytes / ms.median().item() / 1e6
