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
"""Directories that appear complete or not at all, and the files of tables in them."""

import argparse
import contextlib
import inspect
import shutil
import sys

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rich.console import Console
from rich.progress import track

__all__ = ["followed", "published", "run_command", "write_files"]

ROWS_PER_FILE = 1_000_000


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
