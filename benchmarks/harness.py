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
"""Processes of their own in which functions run or take turns, and tables of what they cost.

>>> one, other = Lane(make_one), Lane(make_other, "argument")
>>> race([one, other], turns=9)
>>> ratio(one, other)
>>> measure("python -m benchmarks.speed", {"speed": speed_table}, rows=20e6, turns=9)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np

from tests.variational.streaming.memory import forget_peak, peak_mb

T = TypeVar("T")

Runner = tuple[Callable[[int], object], int]
"""What runs so many steps, and the number of steps of a turn."""


class Turn(NamedTuple):
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
        Called there with *args*; returns a `Runner`, which keeps to the process.
    flags : str
        For PyTensor, such as "floatX=float32".
    """

    def __init__(self, make: Callable[..., Runner], *args: Any, flags: str = ""):
        self.turns: list[Turn] = []
        self.peak_mb = float("nan")
        self._process = _process()
        flags = ",".join(filter(None, [os.environ.get("PYTENSOR_FLAGS"), flags]))
        with patch.dict(os.environ, PYTENSOR_FLAGS=flags):
            self._made = self._process.submit(_make, make, args)

    def wait(self) -> None:
        """Return when the process is ready for its first turn."""
        self._made.result()

    def run(self) -> None:
        """Let the process take a turn."""
        self.turns.append(self._process.submit(_turn).result())

    def close(self) -> None:
        """End the process, and learn the peak of its memory."""
        self.peak_mb = self._process.submit(peak_mb).result()
        self._process.shutdown()

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


_runner: Runner
"""That of a lane, in its process."""


def _make(make: Callable[..., Runner], args: tuple) -> None:
    global _runner
    warnings.simplefilter("ignore")  # of rows in order, which some lanes are meant to have
    _runner = make(*args)


def _turn() -> Turn:
    run, n_steps = _runner
    start = time.perf_counter(), time.process_time(), _disk_mb()
    run(n_steps)
    end = time.perf_counter(), time.process_time(), _disk_mb()
    return Turn(*((b - a) / n_steps for a, b in zip(start, end)))


def _disk_mb() -> float:
    counts = Path("/proc/self/io")
    if not counts.exists():
        return float("nan")
    return int(counts.read_text().split("read_bytes: ")[1].split()[0]) / 1e6


def in_process(function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Call *function* in a fresh process, so that its memory can be told from that of others."""
    with _process() as process:
        return process.submit(function, *args, **options).result()


def peak_growth(function: Callable[..., object], *args: Any) -> float:
    """Return by how many MB the peak memory of a fresh process grows in a call."""
    return in_process(_growth, function, args)


def _growth(function: Callable[..., object], args: tuple) -> float:
    forget_peak()
    before = peak_mb()
    function(*args)
    return peak_mb() - before


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """Leave nothing running when the parent is killed: it would meet itself in the next run."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def filled(text: str, name: str, command: str | None, table: str) -> str:
    """Put a table between its markers in the text of a page.

    Those of pages that PyMC gets name no command.
    """
    bare = f"<!-- {name} -->\n"
    begin = bare if bare in text else f"<!-- {name}: written by `{command}` -->\n"
    before, rest = text.split(begin)
    _, after = rest.split(end := f"<!-- end of {name} -->")
    return f"{before}{begin}{table}{end}{after}"


def markdown(heads: str, lines: Iterable[Iterable[object]]) -> str:
    """Return a table, given its heads with bars between them, and the cells of its lines."""
    rule = "|---" * (1 + heads.count("|")) + "|\n"
    return f"| {heads} |\n{rule}" + "".join(f"| {' | '.join(map(str, x))} |\n" for x in lines)


def load(results: Path) -> dict[str, Any]:
    """Return what was measured before, if anything."""
    return json.loads(results.read_text()) if results.exists() else {}


def save(found: Mapping[str, Any], results: Path) -> None:
    """Replace a file of results, a line for each."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    part = results.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(results)


def about(*packages: str) -> dict[str, Any]:
    """Return the machine, and the versions of packages that are installed."""
    versions = {name: version(name) for name in packages if find_spec(name)}
    return {"machine": platform.platform(), "processors": os.cpu_count(), "versions": versions}


def measure(
    command: str,
    tables: Mapping[str, Callable[..., str]],
    arguments: Sequence[str] | None = None,
    *,
    rows: float,
    **options: Any,
) -> str:
    """Run the command line of a program that measures, and return the last of its tables.

    Parameters
    ----------
    command : str
        The program, as the markers of its tables name it.
    tables : mapping
        Functions by the name of the table that they return as Markdown, given the data and the
        options.
    arguments : sequence of str, optional
        Default: those of the process.
    rows : float
        Default for the rows of a table.
    **options
        Other options of the program, and their defaults; with zero for what it takes a number of,
        a program that keeps its results shows those that it has.
    """
    from benchmarks.cases import Data

    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--rows", type=float, default=rows, help="of a table")
    parser.add_argument("--folder", type=Path, help="for the data, which stay; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the tables into")
    for option, default in options.items():
        parser.add_argument(f"--{option}", type=type(default), default=default)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(chosen.folder or Path(temporary), int(chosen.rows))
        for name in chosen.only:
            text = tables[name](data, **{option: getattr(chosen, option) for option in options})
            sys.stdout.write(f"{name}\n{text}\n")
            if chosen.page is not None:
                chosen.page.write_text(filled(chosen.page.read_text(), name, command, text))
    return text
