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

import argparse
import json
import os
import sys
import tempfile
import threading
import time

from pathlib import Path
from typing import Any

import numpy as np

import pymc as pm

from benchmarks.data import Data
from benchmarks.fits import Case, order_book, stream
from benchmarks.pages import filled
from pymc.variational.streaming import resumable_fit

ALLOWED_MB = 20.0
"""Between the medians of two quarters; the allocator alone moves single readings by ten."""
MOST_STEPS_PER_SECOND = 4_000
"""Of this model; the fit ends when the time is up."""
READ = {"rss_mb": "resident MB", "files": "open files", "threads": "threads"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--rows", type=int, default=5_000_000)
    options.add_argument("--interval", type=float, default=5, help="seconds between readings")
    options.add_argument("--output", type=Path, default=Path("soak"))
    options.add_argument("--page", type=Path, help="file to put the verdict into")
    chosen = options.parse_args()
    watch = Watch(chosen.minutes * 60, chosen.interval)
    with tempfile.TemporaryDirectory() as folder:
        fit(Data(Path(folder), chosen.rows), watch, int(MOST_STEPS_PER_SECOND * watch.seconds))
    report = {"minutes": chosen.minutes, "rows": chosen.rows, **watch.report()}
    chosen.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, chosen.output.with_suffix(".png"))
    sys.stdout.write(verdict(report))
    if chosen.page is not None:
        page = filled(chosen.page.read_text(), "soak", "python -m benchmarks.soak", verdict(report))
        chosen.page.write_text(page)
    sys.exit(0 if report["flat"] else 1)


class Watch:
    """A callback that reads the process's resources, and ends the fit when the time is up."""

    def __init__(self, seconds: float, interval: float):
        self.seconds, self._interval = seconds, interval
        self._start = self._next = time.monotonic()
        self.readings: list[dict[str, float]] = []

    def __call__(self, approx, losses, i: int) -> None:
        now = time.monotonic()
        if i == 1:
            self._start = self._next = now
        if now < self._next:
            return
        self._next = now + self._interval
        reading = {"seconds": round(now - self._start, 1), "steps": i, **resources()}
        self.readings.append(reading)
        if now - self._start >= self.seconds:
            raise StopIteration("the time is up")

    def report(self) -> dict:
        """Return the readings and what they come to."""
        early, late = (
            {name: [reading[name] for reading in quarter] for name in READ}
            for quarter in np.array_split(np.array(self.readings), 4)[1::2]
        )
        megabytes = float(np.median(late["rss_mb"]) - np.median(early["rss_mb"]))
        growth = {name: max(late[name]) - max(early[name]) for name in ("files", "threads")}
        last = self.readings[-1]
        return {
            "steps": last["steps"],
            "steps_per_second": round(last["steps"] / last["seconds"], 1),
            "growth": {"mb": round(megabytes, 1), **growth},
            "flat": megabytes < ALLOWED_MB and max(growth.values()) <= 0,
            "readings": self.readings,
        }


def resources() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def fit(data: Data, watch: Watch, n_steps: int) -> None:
    ds = stream(Case(data.shuffled(data.order_book()), order_book, buffer_size=500_000))
    with pm.Model():
        buffer: Any = ds.as_tensor()
        order_book(buffer[:, :-1], buffer[:, -1], ds.total_size)
        resumable_fit(
            pm.ADVI(random_seed=0),
            n_steps,
            path=data.folder / "soak.fit",
            datasets=[ds],
            callbacks=[watch],
            progressbar=False,
            obj_optimizer=pm.adam(learning_rate=0.01),
        )


def plot(report: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    minutes = [r["seconds"] / 60 for r in report["readings"]]
    for axes, (key, label) in zip(figure.subplots(3, sharex=True), READ.items()):
        axes.plot(minutes, [r[key] for r in report["readings"]])
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
    main()
