"""A few workers that keep something dear (a jail, a process with sympy in it), each used by one thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

W = TypeVar("W")
T = TypeVar("T")
R = TypeVar("R")


class Workers(Generic[W]):
    """`run` hands each item to a free worker, first in first out. Safe to call from several threads."""

    def __init__(self, workers: Sequence[W], name: str) -> None:
        self.workers = workers
        self.free: SimpleQueue[W] = SimpleQueue()
        for worker in workers:
            self.free.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix=name)

    def run(self, work: Callable[[W, T], R], items: Iterable[T]) -> list[R]:
        """One result per item, in order. Raises what `work` raises first."""

        def one(item: T) -> R:
            worker = self.free.get()
            try:
                return work(worker, item)
            finally:
                self.free.put(worker)

        return list(self._threads.map(one, items))

    def close(self) -> Sequence[W]:
        """Wait for what is under way, end the threads, give the workers back to be ended."""
        self._threads.shutdown()
        return self.workers
