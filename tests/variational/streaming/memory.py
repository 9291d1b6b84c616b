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
"""The resident memory of this process, and processes whose memory a test measures."""

import os

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["forget_peak", "in_clean_process", "peak_mb"]


def peak_mb() -> float:
    """Return the largest resident set so far; nan where there is no /proc.

    ``ru_maxrss`` would start at the parent's peak.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Set the peak back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_clean_process(function: Callable, *args: Any) -> Any:
    """Return what a function returns in a process that has only imported what the function needs.

    It is forked from a process that imports what takes long once for all calls, but not what is
    tested, which that process might find elsewhere; and it has this process's environment.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pymc", "pyarrow.parquet", "scipy.stats"])
    here = os.environ.copy(), os.getcwd()
    with ProcessPoolExecutor(1, context, _move_to, here) as pool:
        return pool.submit(function, *args).result()


def _move_to(environment: dict[str, str], folder: str) -> None:
    os.environ.update(environment)
    os.chdir(folder)
