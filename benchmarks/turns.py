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
"""Processes that take turns, so that whatever else the machine does meets all of them.

>>> one, other = Lane(make_one), Lane(make_other, "argument")
>>> race([one, other], turns=9)
>>> ratio(one, other)

What a lane is given is called in a process of its own, and returns what runs the steps there.
"""

import os
import statistics
import time
import warnings

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.variational.streaming.memory import peak_mb

__all__ = ["Lane", "Runner", "Turn", "race", "ratio"]


@dataclass(frozen=True, slots=True)
class Runner:
    """What takes turns in a process."""

    run: Callable[[int], object]
    """Run so many steps, and return when they are done."""
    steps: int
    """Of a turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a step cost in one turn."""

    seconds: float
    processor_seconds: float
    """Of all threads of the process."""
    disk_mb: float
    """Read from the disk, not from the page cache; nan where there is no /proc."""


class Lane:
    """A process of its own, and the turns that it has run.

    Parameters
    ----------
    make : callable
        Called there with *args*; returns a Runner.
    flags : str
        For PyTensor, such as "floatX=float32".
    """

    def __init__(self, make: Callable[..., Runner], *args: Any, flags: str = ""):
        self.turns: list[Turn] = []
        self.peak_mb = float("nan")
        spawn = get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, args), daemon=True)
        flags = ",".join(filter(None, [os.environ.get("PYTENSOR_FLAGS"), flags]))
        with patch.dict(os.environ, PYTENSOR_FLAGS=flags):
            self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Return when the process is ready for its first turn."""
        self._connection.recv()

    def run(self) -> None:
        """Let the process take a turn."""
        self._connection.send(True)
        self.turns.append(self._connection.recv())

    def close(self) -> None:
        """End the process, and learn the peak of its memory."""
        self._connection.send(False)
        self.peak_mb = self._connection.recv()
        self._process.join()

    def median(self, quantity: str) -> float:
        return statistics.median(getattr(turn, quantity) for turn in self.turns)


def race(lanes: Iterable[Lane], *, turns: int, before: Callable[[], object] | None = None) -> None:
    """Let all lanes take turns when they are ready, and end them; call *before* ahead of each."""
    lanes = list(lanes)
    for lane in lanes:
        lane.wait()
    for _ in range(turns):
        for lane in lanes:
            if before is not None:
                before()
            lane.run()
    for lane in lanes:
        lane.close()


def ratio(ours: Lane, theirs: Lane) -> str:
    """Return our speed over theirs: the median over turns next to each other, and its quartiles."""
    if ours is theirs:
        return "1.00"
    ratios = [b.seconds / a.seconds for a, b in zip(ours.turns, theirs.turns)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _serve(connection: Connection, make: Callable[..., Runner], args: tuple) -> None:
    warnings.simplefilter("ignore")  # of rows in order, which some lanes are meant to have
    runner = make(*args)
    connection.send(None)
    while connection.recv():
        connection.send(_turn(runner))
    connection.send(peak_mb())


def _turn(runner: Runner) -> Turn:
    start = time.perf_counter(), time.process_time(), _disk_mb()
    runner.run(runner.steps)
    end = time.perf_counter(), time.process_time(), _disk_mb()
    return Turn(*((b - a) / runner.steps for a, b in zip(start, end)))


def _disk_mb() -> float:
    counts = Path("/proc/self/io")
    if not counts.exists():
        return float("nan")
    return int(counts.read_text().split("read_bytes: ")[1].split()[0]) / 1e6
