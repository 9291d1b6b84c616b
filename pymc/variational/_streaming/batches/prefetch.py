#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""Read a source epoch after epoch, ahead of its consumer in a thread."""

import os
import sys
import threading
import time
import weakref

from collections.abc import Callable, Generator, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from pymc.variational._streaming.batches.rebatch import (
    Chunk,
    EpochEnd,
    require_exact,
    require_shape,
)
from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.base import Source

__all__ = ["Prefetcher", "read_epochs"]

_SWITCH_INTERVAL = 1e-4
"""Seconds.  A compiled step holds the interpreter lock, and by default a thread that waits asks for
it every 5 ms only: many steps, during which nothing would be read."""
_WAIT = 0.1
"""Seconds.  A signal between two bytecodes does not end a wait that begins just after it."""
_REST = 1.0
"""Seconds without a call of :meth:`Prefetcher.touch` after which the usual interval returns."""
_CLOSING = 0.8
"""Seconds that closing waits for a read that has begun.  One that takes longer ends by itself."""


def read_epochs(
    source: Source,
    sample_shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    epoch: int = 0,
    start: int = 0,
    cycle: bool = True,
    examine: Callable[[Chunk | EpochEnd], Iterable[Any]] = lambda item: (item,),
) -> Generator[Any]:
    """Yield the chunks and the ends of epochs, and refuse values that *dtype* cannot hold.

    Each item goes through *examine*, which returns it after whatever it finds in it.
    """
    while True:
        offset = start
        for rows in source.blocks(epoch, start):
            require_shape(rows, sample_shape)
            require_exact(rows, dtype, source, epoch, offset)
            yield from examine(Chunk(epoch, offset, rows))
            offset += len(rows)
            del rows  # while the next ones are read
        if offset == 0:
            raise StreamError(f"source gave no rows in epoch {epoch}")
        yield from examine(EpochEnd(epoch, offset))
        if not cycle:
            return
        epoch, start = epoch + 1, 0


class Prefetcher:
    """Iterate over *items* in a thread of its own, which stays one chunk of rows ahead.

    An exception in the thread is raised where the consumer would have met it.  The thread ends when
    the items do, on :meth:`close`, or when nothing refers to the prefetcher.  A forked process has
    no copy of it, and is refused.  While its items are used, the interpreter switches between
    threads more often than usual.
    """

    def __init__(self, items: Generator[Any]):
        self.thread = _Reader(items)
        self._finalizer = weakref.finalize(self, self.thread.end)
        self.touch()
        try:
            self.thread.start()
        except BaseException:  # an interrupt, or no more threads
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._finalizer.alive:
            raise StopIteration
        if os.getpid() != self.thread.pid:
            raise StreamError(
                "the stream was opened before this process was forked, and its thread is not "
                "in this process; the dataset is closed here now: open it anew with "
                "fit_callback() or advance(), or spawn processes instead"
            )
        item, err = self.thread.next()
        if item is not None:
            return item
        self.close()
        raise err or StopIteration

    def touch(self) -> None:
        """Tell that the items are used: a thread whose items nobody uses rests."""
        self.thread.last_use = time.monotonic()
        _switch_interval.shorten(self.thread)

    def close(self) -> None:
        """End the thread, which closes *items*.

        A read that blocks is waited for less than a second: when it returns, its thread closes
        *items* and ends.
        """
        self._finalizer()


class _Reader(threading.Thread):
    """The thread of a prefetcher, to which it does not refer, or that would never be collected."""

    def __init__(self, items: Generator[Any]):
        super().__init__(name="pymc-streaming-prefetch", daemon=True)
        self.pid = os.getpid()
        self.last_use = 0.0
        self._items = items
        self._queue: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._permits: SimpleQueue[None] = SimpleQueue()  # a semaphore, but each call is one in C
        self._stopping, self._ended = threading.Event(), threading.Event()

    def next(self) -> tuple[Any, BaseException | None]:
        """Return the next item; an interrupt that just misses the wait ends it a little later."""
        while True:
            try:
                item, err = self._queue.get(timeout=_WAIT)
            except Empty:
                continue
            if _has_rows(item):
                self._permits.put(None)
            return item, err

    def run(self) -> None:
        err: BaseException | None = None
        try:
            for item in self._items:
                self._queue.put((item, None))
                # One chunk ahead: what follows a chunk may overwrite the one before, which the
                # consumer has done with when it takes this one.  Items without rows need no permit.
                if _has_rows(item):
                    del item  # or its memory would stay while the next one is read
                    self._wait_for_permit()
                if self._stopping.is_set():
                    break
        except BaseException as raised:
            err = raised
        finally:
            self._items.close()
            _switch_interval.restore(self)
            self._queue.put((None, err))
            self._ended.set()

    def _wait_for_permit(self) -> None:
        """Wait for a permit, and restore the usual interval if nobody uses the items meanwhile."""
        while True:
            try:
                return self._permits.get(timeout=_REST)
            except Empty:
                if time.monotonic() - self.last_use > _REST:
                    _switch_interval.restore(self)

    def end(self) -> None:
        """Stop reading, and wait for the end of the thread unless a read takes long."""
        if os.getpid() != self.pid:
            return  # the thread may have held these locks when the process was forked
        self._stopping.set()
        self._permits.put(None)
        _switch_interval.restore(self)
        # The garbage collector can run this in the thread itself.
        if threading.current_thread() is not self and self._ended.wait(_CLOSING):
            self.join()


class _SwitchInterval:
    """The interval at which the interpreter switches threads, short while any prefetcher is in use.

    The threads are kept instead of their number, since an interrupt can fall between any two lines,
    so that a prefetcher is closed that never shortened the interval.  There is no lock for the same
    reason: one that an interrupt left behind would stop the reading thread for ever.
    """

    def __init__(self) -> None:
        self._using: set[threading.Thread] = set()
        self._usual = 0.0

    def shorten(self, thread: threading.Thread) -> None:
        if thread in self._using:
            return
        self._using.add(thread)
        interval = sys.getswitchinterval()
        if interval > _SWITCH_INTERVAL:
            self._usual = interval
            sys.setswitchinterval(_SWITCH_INTERVAL)

    def restore(self, thread: threading.Thread) -> None:
        if self._using == {thread} and self._usual:
            sys.setswitchinterval(self._usual)
        self._using.discard(thread)


_switch_interval = _SwitchInterval()


def _has_rows(item: Any) -> bool:
    return isinstance(item, Chunk) and len(item.rows) > 0
