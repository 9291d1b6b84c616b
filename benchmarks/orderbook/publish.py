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
"""Directories that appear complete or not at all, and the bar that shows how far they are."""

import argparse
import contextlib
import shutil

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

__all__ = ["bar", "published", "run_command"]


@contextlib.contextmanager
def published(
    destination: str | Path, *, overwrite: bool, resumable: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Make a directory that appears by one rename when the block ends without an error.

    Parameters
    ----------
    destination : str or Path
        The directory to make.
    overwrite : bool
        Replace what is there.
    resumable : bool
        After a kill or an interrupt, the next call finds the scratch directory as it was left.

    Yields
    ------
    content : Path
        Empty directory to fill; it becomes *destination*.
    scratch : Path
        Directory on the same disk, gone in the end.

    Raises
    ------
    FileExistsError
        If *destination* exists and *overwrite* is False.
    """
    destination = Path(destination)
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists; choose another name, or pass overwrite")
    unfinished = destination.parent / f".{destination.name}.unfinished"
    content, scratch, replaced = (unfinished / name for name in ("content", "scratch", "replaced"))
    kept = resumable and scratch.is_dir()
    shutil.rmtree(content if kept else unfinished, ignore_errors=True)
    for directory in (content, scratch):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield content, scratch
        if destination.exists():
            destination.rename(replaced)
        content.rename(destination)
    except BaseException as error:
        if not resumable or isinstance(error, Exception):
            shutil.rmtree(unfinished)
        raise
    shutil.rmtree(unfinished)


def bar(show: bool) -> Progress:
    """Make a progress bar on standard error."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def run_command(
    parser: argparse.ArgumentParser, function: Callable, arguments: Sequence[str] | None
) -> Any:
    """Call a function that publishes a directory with the options of a command line."""
    parser.add_argument("--overwrite", action="store_true", help="replace the destination")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options = vars(parser.parse_args(arguments))
    try:
        return function(progressbar=not options.pop("quiet"), **options)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
