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

from collections.abc import Callable, Generator, Iterator
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
    compare: Callable[[Chunk | EpochEnd], Any] = lambda item: None,
) -> Generator[Any]:
    """Read a source epoch after epoch, and refuse values that *dtype* cannot hold.

    Parameters
    ----------
    compare : callable
        Function that is shown each item before it is yielded. What it returns comes first, unless
        it is None.

    Yields
    ------
    Chunk, EpochEnd, or what *compare* returned
    """
    while True:
        offset = start
        for rows in source.blocks(epoch, start):
            require_shape(rows, sample_shape)
            require_exact(rows, dtype, source, offset)
            chunk = Chunk(epoch, offset, rows)
            if (found := compare(chunk)) is not None:
                yield found
            yield chunk
            offset += len(rows)
            del chunk, rows  # while the next ones are read
        if offset == 0:
            raise StreamError(f"source gave no rows in epoch {epoch}")
        end = EpochEnd(epoch, offset)
        if (found := compare(end)) is not None:
            yield found
        yield end
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
        self._queue: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._permits: SimpleQueue[None] = SimpleQueue()  # a semaphore, but each call is one in C
        stop, ended = threading.Event(), threading.Event()
        self._use = _Use()
        # The thread must not refer to self, or self would never be collected.
        self.thread = threading.Thread(
            target=_run,
            args=(items, self._queue, self._permits, stop, ended, self._use),
            name="pymc-streaming-prefetch",
            daemon=True,
        )
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(
            self, _close, self.thread, self._permits, stop, ended, self._pid
        )
        _switch_interval.shorten(self.thread)
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
        if os.getpid() != self._pid:
            raise StreamError(
                "the stream was opened before this process was forked, and its thread is not "
                "in this process; the dataset is closed here now: open it anew with "
                "fit_callback() or advance(), or spawn processes instead"
            )
        item, err = self._wait()
        if item is not None:
            if _has_rows(item):
                self._permits.put(None)
            return item
        self.close()
        if err is None:
            raise StopIteration
        raise err

    def _wait(self) -> tuple[Any, BaseException | None]:
        """Return the next item; an interrupt that just misses the wait ends it a little later."""
        while True:
            try:
                return self._queue.get(timeout=_WAIT)
            except Empty:
                continue

    def touch(self) -> None:
        """Tell that the items are used: a thread whose items nobody uses rests."""
        self._use.last = time.monotonic()
        if self._use.rests:
            self._use.rests = False
            _switch_interval.shorten(self.thread)

    def close(self) -> None:
        """End the thread, which closes *items*.

        A read that blocks is waited for less than a second: when it returns, its thread closes
        *items* and ends.
        """
        self._finalizer()


class _Use:
    """When the items of a prefetcher were used last, and whether its thread rests."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.rests = False

    def wait(self, permits: SimpleQueue) -> None:
        """Wait for a permit, and restore the usual interval if that takes long."""
        while True:
            try:
                return permits.get(timeout=_REST)
            except Empty:
                if not self.rests and time.monotonic() - self.last > _REST:
                    self.rests = True
                    _switch_interval.restore(threading.current_thread())


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


def _run(
    items: Generator[Any],
    queue: SimpleQueue,
    permits: SimpleQueue,
    stop: threading.Event,
    ended: threading.Event,
    use: _Use,
) -> None:
    err: BaseException | None = None
    try:
        for item in items:
            queue.put((item, None))
            # One chunk ahead: what follows a chunk may overwrite the one before, which the
            # consumer has done with when it takes this one.  Items without rows need no permit.
            if _has_rows(item):
                del item  # or its memory would stay while the next one is read
                use.wait(permits)
            if stop.is_set():
                break
    except BaseException as raised:
        err = raised
    finally:
        items.close()
        _switch_interval.restore(threading.current_thread())
        queue.put((None, err))
        ended.set()


def _close(
    thread: threading.Thread,
    permits: SimpleQueue,
    stop: threading.Event,
    ended: threading.Event,
    pid: int,
) -> None:
    if os.getpid() != pid:
        return  # the thread may have held these locks when the process was forked
    stop.set()
    permits.put(None)
    _switch_interval.restore(thread)
    # The garbage collector can run this in the thread itself.
    if threading.current_thread() is not thread and ended.wait(_CLOSING):
        thread.join()
