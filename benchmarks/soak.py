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
"""Tell whether memory, open files and threads stay flat in a long fit at full speed.

    python -m benchmarks.soak --minutes 60 --output soak

Writes ``soak.json`` and ``soak.png``, prints a verdict, and exits with 1 if something grew.  The
fit is :func:`resumable_fit` with checkpoints, so what it does besides stepping is measured too.
Growth is from the second quarter of the readings, by which time every buffer is full, to the last:
of the median for memory, of the most for files (one is opened and closed every epoch) and threads.
PyMC makes room for the losses of all steps at the start.
"""

import os
import sys
import threading
import time

from pathlib import Path

import numpy as np

import pymc as pm

from benchmarks.data import Data
from benchmarks.fits import Case, order_book, stream
from benchmarks.pages import about, load, measure, save
from pymc.variational.streaming import resumable_fit

COMMAND = "python -m benchmarks.soak"
ALLOWED_MB = 20.0
"""Between the medians of two quarters; the allocator alone moves single readings by ten."""
MOST_STEPS_PER_SECOND = 4_000
"""Of this model; the fit ends when the time is up."""
READINGS = 720
READ = {"rss_mb": "resident MB", "files": "open files", "threads": "threads"}


def soak(data: Data, minutes: float, output: Path) -> str:
    """Fit for so many minutes, or with zero tell of the fit before."""
    results = output.with_suffix(".json")
    if minutes:
        readings = fit(data, 60 * minutes)
        report = {"about": about("pymc", "pytensor"), "minutes": minutes, "rows": data.n_rows}
        save({**report, **growth(readings), "readings": readings}, results)
        plot(readings, output.with_suffix(".png"))
    return verdict(load(results))


def fit(data: Data, seconds: float) -> list[dict[str, float]]:
    """Fit until the time is up, and return what was read of the process meanwhile."""
    readings: list[dict[str, float]] = []
    start = time.monotonic()

    def read(approx, losses, i: int) -> None:
        nonlocal start
        if i == 1:
            start = time.monotonic()
        passed = time.monotonic() - start
        if passed * READINGS >= len(readings) * seconds:
            readings.append({"seconds": round(passed, 1), "steps": i, **resources()})
        if passed >= seconds:
            raise StopIteration("the time is up")

    case = Case(data.shuffled(data.order_book()), order_book, buffer_size=500_000)
    ds = stream(case)
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        resumable_fit(
            pm.ADVI(random_seed=0),
            int(MOST_STEPS_PER_SECOND * seconds),
            path=data.folder / "soak.fit",
            datasets=[ds],
            callbacks=[read],
            progressbar=False,
            obj_optimizer=pm.adam(learning_rate=0.01),
        )
    return readings


def resources() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def growth(readings: list[dict[str, float]]) -> dict:
    """Return what the readings come to."""
    early, late = (
        {name: [reading[name] for reading in quarter] for name in READ}
        for quarter in np.array_split(np.array(readings), 4)[1::2]
    )
    megabytes = float(np.median(late["rss_mb"]) - np.median(early["rss_mb"]))
    counts = {name: max(late[name]) - max(early[name]) for name in ("files", "threads")}
    return {
        "steps": readings[-1]["steps"],
        "growth": {"mb": round(megabytes, 1), **counts},
        "flat": megabytes < ALLOWED_MB and max(counts.values()) <= 0,
    }


def plot(readings: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    minutes = [reading["seconds"] / 60 for reading in readings]
    for axes, (key, label) in zip(figure.subplots(3, sharex=True), READ.items()):
        axes.plot(minutes, [reading[key] for reading in readings])
        axes.set(ylabel=label, ylim=(0, None))
    axes.set_xlabel("minutes")
    figure.savefig(path, dpi=100)


def verdict(report: dict) -> str:
    return (
        f"{'flat' if report['flat'] else 'GREW'}: {report['steps']:,} steps in "
        f"{report['minutes']:g} minutes, {report['growth']['mb']:+.1f} MB, "
        f"{report['growth']['files']:+} files, {report['growth']['threads']:+} threads\n"
    )


if __name__ == "__main__":
    text = measure(COMMAND, {"soak": soak}, rows=5e6, minutes=60.0, output=Path("soak"))
    sys.exit(text.startswith("GREW"))
