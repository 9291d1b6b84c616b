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
"""Read ahead in a thread."""

import os
import sys
import threading
import weakref

from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Any

from pymc.variational._streaming.batches.rebatch import Chunk
from pymc.variational._streaming.errors import StreamError

__all__ = ["Prefetcher"]

_SWITCH_INTERVAL = 1e-4
"""Seconds.  A compiled step holds the interpreter lock, and by default a thread that waits asks for
it every 5 ms only: many steps, during which nothing would be read."""
_STARTING = 1.0
"""Seconds that a thread may take to start."""


class Prefetcher:
    """Iterate over *chunks* in a thread of its own, which stays one chunk of rows ahead.

    What follows a chunk of rows is asked for when the consumer has taken that chunk, and so has
    done with the one before.  An exception in the thread is raised where the consumer would have
    met it.  The thread ends when the chunks do, on :meth:`close`, or when nothing refers to the
    prefetcher.  A forked process has no copy of it, and is refused.  Until the thread ends, the
    interpreter switches between threads more often than usual.
    """

    def __init__(self, chunks: Generator[Any]):
        self._queue: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._taken: SimpleQueue[None] = SimpleQueue()  # a semaphore in one call
        started, stop = threading.Event(), threading.Event()
        thread = threading.Thread(
            target=_run,
            args=(chunks, self._queue, self._taken, started, stop),
            name="pymc-streaming-prefetch",
            daemon=True,
        )
        # The thread must not refer to self, or self would never be collected.
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, thread, stop, self._taken, self._pid)
        _switching.hurry(thread)
        try:
            thread.start()
        except KeyboardInterrupt:
            started.wait(_STARTING)  # or it could not be joined yet
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Chunk:
        if not self._finalizer.alive:
            raise StopIteration
        if os.getpid() != self._pid:
            raise StreamError(
                "the stream was opened before this process was forked, and its thread is not "
                "in this process; the dataset is closed here now: open it anew with "
                "fit_callback() or advance(), or spawn processes instead"
            )
        chunk, err = self._queue.get()
        if chunk is not None:
            if _has_rows(chunk):
                self._taken.put(None)
            return chunk
        self.close()
        if err is None:
            raise StopIteration
        raise err

    def close(self) -> None:
        """End the thread and wait for it; closes *chunks*."""
        self._finalizer()


class _Switching:
    """The interval at which the interpreter switches threads, shorter while any hurries.

    An interrupt can fall between any two lines: who relaxes need not have hurried, and the interval
    is short only while someone is known to hurry.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # finalizers run anywhere, also inside these methods
        self._in_a_hurry: set[threading.Thread] = set()
        self._usual = 0.0

    def hurry(self, thread: threading.Thread) -> None:
        with self._lock:
            if not self._in_a_hurry:
                self._usual = sys.getswitchinterval()
            self._in_a_hurry.add(thread)
            sys.setswitchinterval(min(_SWITCH_INTERVAL, self._usual))

    def relax(self, thread: threading.Thread) -> None:
        with self._lock:
            if self._in_a_hurry == {thread}:
                sys.setswitchinterval(self._usual)
            self._in_a_hurry.discard(thread)


_switching = _Switching()


def _has_rows(item: Any) -> bool:
    return isinstance(item, Chunk) and len(item.rows) > 0


def _run(
    chunks: Generator[Any],
    queue: SimpleQueue,
    taken: SimpleQueue,
    started: threading.Event,
    stop: threading.Event,
) -> None:
    started.set()
    end: BaseException | None = None
    try:
        for chunk in chunks:
            queue.put((chunk, None))
            if _has_rows(chunk):
                del chunk  # while the next one is read
                taken.get()
            if stop.is_set():
                break
    except BaseException as err:
        end = err
    finally:
        chunks.close()
        queue.put((None, end))


def _stop(thread: threading.Thread, stop: threading.Event, taken: SimpleQueue, pid: int) -> None:
    if os.getpid() != pid:
        return  # the thread may have held these locks when the process was forked
    _switching.relax(thread)
    stop.set()
    taken.put(None)
    # The garbage collector can run this in the thread itself, an interrupt before it starts.
    if thread.is_alive() and threading.current_thread() is not thread:
        thread.join()
