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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from pymc.progress_bar import CustomProgress, default_progress_theme

__all__ = ["digest", "draw_seed", "positive_int", "progress_bar"]


def digest(*parts: Any) -> str:
    """Return a hash of *parts*, which are compared by their ``repr``."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


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
def progress_bar(
    description: str, total: int | None = None, *, show: bool = True
) -> Iterator[Callable[..., None]]:
    """Show on stderr how many rows are done and how fast.

    In a notebook without ipywidgets, where rich would warn at each change, only the end is shown.

    Yields
    ------
    callable
        Adds a number of rows to those that are done, and may change the description.
    """
    options: dict[str, Any] = {"theme": default_progress_theme, "stderr": True}
    console = Console(**options)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        console = Console(**options, force_jupyter=False, force_terminal=False)
    bar = CustomProgress(
        "[progress.description]{task.description}",
        BarColumn(),
        "[progress.percentage]{task.percentage:>3.0f}%",
        _RowsPerSecond(),
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
