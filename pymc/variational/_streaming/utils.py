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
"""Helpers that several subpackages need."""

import hashlib
import logging
import os
import time
import zlib

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from pymc.progress_bar import CustomProgress, default_progress_theme

__all__ = [
    "EpochLog",
    "crc_of_sums",
    "digest",
    "draw_seed",
    "positive_int",
    "progress_bar",
    "replacing",
]

_WORDS = 512
"""Words of 8 bytes that are added up before their sums get a CRC, which is ten times as slow."""
_HELD = 4096
"""Bytes of which zlib computes a CRC without giving up the interpreter lock, for which it would wait."""
_MOST_LINES = 10
_PAUSE = 10.0
"""Lines about single epochs, and seconds between those that follow."""


def crc_of_sums(data: np.ndarray, number: int = 0) -> int:
    """Return a CRC-32 of the sums of runs of words, in a fraction of the time of one of the bytes."""
    whole = len(data) - len(data) % (8 * _WORDS)
    sums = data[:whole].view(np.uint64).reshape(-1, _WORDS).sum(axis=1).view(np.uint8)
    for piece in (*np.split(sums, range(_HELD, len(sums), _HELD)), data[whole:]):
        number = zlib.crc32(piece, number)
    return number


def digest(*parts: Any) -> str:
    """Return a hash of *parts*, which are compared by their ``repr``, or as bytes."""
    short = [hashlib.blake2b(p).digest() if isinstance(p, bytes) else p for p in parts]
    return hashlib.blake2b(repr(short).encode(), digest_size=16).hexdigest()


def draw_seed(seed: int | None) -> int:
    """Return *seed*, or new entropy where it is None."""
    if seed is None:
        return int(np.random.SeedSequence().entropy)  # type: ignore[arg-type]
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a non-negative integer or None")
    return int(seed)


def positive_int(name: str, value: Any) -> int:
    """Return *value* as a plain int of at least 1."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return int(value)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside *path* to write, which takes its place once it is whole and on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as err:
        if err.errno is not None:
            err.filename = os.fspath(path)  # a full disk names none
        raise
    finally:
        part.unlink(missing_ok=True)


class EpochLog:
    """Tells of each epoch: how many rows, how fast, and whether the fit waits for data.

    After ten lines, one line every ten seconds stands for all epochs since the last.
    """

    def __init__(self, logger: logging.Logger, offset: int = 0):
        self.waited = 0.0
        """Seconds spent waiting for data since the last line."""
        self._logger = logger
        self._rows, self._epochs, self._lines = -offset, 0, 0
        self._start = time.perf_counter()

    def end_epoch(self, epoch: int, n_rows: int) -> None:
        now = time.perf_counter()
        self._rows, self._epochs = self._rows + n_rows, self._epochs + 1
        seconds = max(now - self._start, 1e-9)
        if self._lines >= _MOST_LINES and seconds < _PAUSE:
            return
        first = epoch - self._epochs + 1
        epochs = f"epoch {epoch}" if first == epoch else f"epochs {first} to {epoch}"
        self._logger.info(
            f"{epochs}: {self._rows:,} rows in {seconds:.1f} s ({self._rows / seconds:,.0f} rows/s), "
            f"{min(self.waited / seconds, 1):.0%} of the time waiting for data"
        )
        self._start, self._lines = now, self._lines + 1
        self._rows, self._epochs, self.waited = 0, 0, 0.0


@contextmanager
def progress_bar(
    description: str, total: int | None = None, *, show: bool = True
) -> Iterator[Callable[..., None]]:
    """Show on stderr how many rows are done and how fast.

    It yields a function that adds rows to those that are done.  In a notebook without ipywidgets,
    where rich would warn at each change, only the end is shown.
    """
    options: dict[str, Any] = {"theme": default_progress_theme, "stderr": True}
    console = Console(**options)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        console = Console(**options, force_jupyter=False, force_terminal=False)
    bar = CustomProgress(
        "[progress.description]{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        _RowsPerSecond(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=console,
        disable=not show,
    )
    with bar:
        task = bar.add_task(description, total=total)

        def advance(n_rows: float, description: str | None = None) -> None:
            bar.update(task, advance=n_rows, description=description)

        yield advance


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s")
