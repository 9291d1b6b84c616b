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
"""What programs that measure share: processes of their own, their command lines, and files.

It imports neither PyMC nor anything else that takes long.
"""

import argparse
import contextlib
import inspect
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rich.console import Console
from rich.progress import track

ROWS_PER_FILE = 1_000_000
T = TypeVar("T")

Runner = tuple[Callable[[int], object], int]
"""What runs so many steps, and the number of steps of a turn."""


class Turn(NamedTuple):
    """What a step cost in one turn; processor seconds are those of all threads."""

    seconds: float
    processor_seconds: float


class Lane:
    """A process of its own, and the turns that it has run.

    *make* is called there with *args* and returns a `Runner`, which keeps to the process.  Variables
    of the *environment* are set there; those of PYTENSOR_FLAGS are added to what is set already.
    """

    def __init__(self, make: Callable[..., Runner], *args: Any, **environment: str):
        self.turns: list[Turn] = []
        self.process = _process()
        flags = os.environ.get("PYTENSOR_FLAGS"), environment.pop("PYTENSOR_FLAGS", "")
        with patch.dict(os.environ, environment, PYTENSOR_FLAGS=",".join(filter(None, flags))):
            self.made = self.process.submit(_make, make, args)

    def median(self, quantity: str) -> float:
        return statistics.median(getattr(turn, quantity) for turn in self.turns)


def race(lanes: Iterable[Lane], *, turns: int) -> None:
    """Let all lanes take turns when they are ready, and end them."""
    lanes = list(lanes)
    for lane in lanes:
        lane.made.result()
    for _ in range(turns):
        for lane in lanes:
            lane.turns.append(lane.process.submit(_turn).result())
    for lane in lanes:
        lane.process.shutdown()


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
    start = time.perf_counter(), time.process_time()
    run(n_steps)
    end = time.perf_counter(), time.process_time()
    return Turn(*((b - a) / n_steps for a, b in zip(start, end)))


def in_process(function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Call *function* in a fresh process, so that its memory can be told from that of others."""
    with _process() as process:
        return process.submit(function, *args, **options).result()


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

    *command* is the program as the markers of its *tables* name it, which are functions that return
    Markdown, given the data and the *options*; those have their defaults here, and with zero for
    what it takes a number of, a program that keeps its results shows those that it has.
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


def run_command(function: Callable, arguments: Sequence[str] | None = None) -> None:
    """Call a function with the options of a command line, and print what it returns.

    Parameters without a default are paths; the others are options of the same name.
    """
    about = (function.__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.orderbook.{function.__name__}", description=about
    )
    for name, parameter in inspect.signature(function).parameters.items():
        option, default = f"--{name.replace('_', '-')}", parameter.default
        if default is parameter.empty:
            parser.add_argument(name, type=Path)
        elif isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(option, type=type(default), default=default)
    try:
        sys.stdout.write(f"{function(**vars(parser.parse_args(arguments))) or ''}\n")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


@contextlib.contextmanager
def published(destination: str | Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Make a directory that appears by one rename when the block ends without an error.

    Yields an empty directory to fill, which becomes *destination*, and one for scratch files on the
    same disk, gone in the end or after an error; what lies in it at a kill or an interrupt is found
    there by the next call. What is there already is replaced only with *overwrite*.
    """
    destination = Path(destination)
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists; choose another name, or pass overwrite")
    unfinished = destination.parent / f".{destination.name}.unfinished"
    content, scratch, replaced = (unfinished / name for name in ("content", "scratch", "replaced"))
    for directory in (content, replaced):
        shutil.rmtree(directory, ignore_errors=True)
    for directory in (content, scratch):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield content, scratch
        if destination.exists():
            destination.rename(replaced)
        content.rename(destination)
    except BaseException as error:
        if isinstance(error, Exception) or not any(scratch.iterdir()):
            shutil.rmtree(unfinished)
        raise
    shutil.rmtree(unfinished)


def write_files(tables: Iterable[pa.Table], directory: Path) -> None:
    """Write tables, one after the other, as Parquet files of so many rows whose names sort."""
    rows, number = None, 0
    for table in tables:
        rows = table if rows is None else pa.concat_tables([rows, table])
        while len(rows) > ROWS_PER_FILE:
            _write_file(rows[:ROWS_PER_FILE], directory, number)
            rows, number = rows[ROWS_PER_FILE:], number + 1
    if rows is not None:
        _write_file(rows, directory, number)


def _write_file(rows: pa.Table, directory: Path, number: int) -> None:
    # Imbalances are too many for a dictionary, which would be given up half way.
    pq.write_table(
        rows.combine_chunks(),
        directory / f"part-{number:05}.parquet",
        compression="zstd",
        use_dictionary=["mid", "spread", "up"],
    )


def followed(items: Iterable, description: str, total: int, show: bool) -> Iterable:
    """Show on standard error how many of *items* are done."""
    return track(items, description, total, console=Console(stderr=True), disable=not show)
