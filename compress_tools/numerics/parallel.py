"""Experts side by side: one thread for each, so that the bytes depend neither on the workers nor on the cores."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """``[function(item) for item in items]`` on ``workers`` threads; products inside take one thread each.

    Experts of a layer are alike and independent, so this keeps all cores busy without the waiting that threads
    inside of small products cost. torch and the solvers release the interpreter lock.

    Raises:
        whatever ``function`` raises first, in the order of ``items``; what has not begun by then is dropped.
    """
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(function, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@cache
def _libraries() -> ThreadpoolController:
    """What is loaded; finding it takes longer than a small product."""
    return ThreadpoolController()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Products of torch and numpy take one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
