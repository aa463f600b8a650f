"""Model work on threads: few at once, a bounded queue, and a slot that is free again when the work ends.

A slot is held by the thread that works, not by the request that asked: a client that leaves sets the
work's cancel flag, and the next request starts when the thread has seen it.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Busy", "Stream", "Workers"]

T = TypeVar("T")


class Busy(Exception):
    """Everything runs and the queue is full."""


class Workers:
    """At most `running` pieces of work at once and `waiting` more in line. Belongs to one event loop."""

    def __init__(self, running: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(running, thread_name_prefix="qlx-work")
        self._free = asyncio.Semaphore(running)
        self._limit = running + waiting
        self._taken = 0
        self._stopping = threading.Event()

    @property
    def taken(self) -> int:
        """How many requests run or wait."""
        return self._taken

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function on a thread and wait for it.

        Raises:
            Busy: the queue is full; nothing was started.
        """
        await self._take()
        return await asyncio.shield(self._start(work))

    async def stream(self, make: Callable[[Callable[[], bool]], Iterator[T]]) -> "Stream[T]":
        """Run an iterator on a thread, and hand out its items as they come.

        `make` gets a function that says whether to stop; it must be asked before every item.

        Raises:
            Busy: the queue is full; nothing was started.
        """
        await self._take()
        stream: Stream[T] = Stream(self._stopping)
        self._start(lambda: stream.produce(make))
        return stream

    async def _take(self) -> None:
        if self._taken >= self._limit:
            raise Busy
        self._taken += 1
        try:
            await self._free.acquire()
        except asyncio.CancelledError:
            self._taken -= 1
            raise

    def _start(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._give)
        return future

    def _give(self, future: "asyncio.Future[T]") -> None:
        self._taken -= 1
        self._free.release()
        if not future.cancelled():
            future.exception()

    def stop(self) -> None:
        """Cancel what runs and let nothing wait; the threads end by themselves."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Stream(Generic[T]):
    """Items of a running iterator, for one consumer in the event loop that made it."""

    def __init__(self, stopping: threading.Event) -> None:
        self._items: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._stopping = stopping
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the iterator to end; safe from any thread, any number of times."""
        self._cancelled.set()

    def produce(self, make: Callable[[Callable[[], bool]], Iterator[T]]) -> None:
        """Run the iterator to its end, on a worker thread."""
        failure: BaseException | None = None
        try:
            for item in make(self._should_stop):
                self._put(item, None)
        except Exception as error:  # noqa: BLE001 - raised again where the items are consumed
            failure = error
        self._put(None, failure)

    def _should_stop(self) -> bool:
        return self._cancelled.is_set() or self._stopping.is_set()

    def _put(self, item: T | None, failure: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, (item, failure))

    async def __aiter__(self) -> AsyncIterator[T]:
        """Every item; an error of the iterator is raised here."""
        while True:
            item, failure = await self._items.get()
            if failure is not None:
                raise failure
            if item is None:
                return
            yield item
