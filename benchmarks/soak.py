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

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pymc as pm

from benchmarks.orderbook.experiment import logistic
from benchmarks.pages import filled
from pymc.variational.streaming import (
    StreamingDataset,
    parquet_source,
    resumable_fit,
    shuffle_buffer,
)

ALLOWED_MB = 20.0
"""Between the medians of two quarters; the allocator alone moves single readings by ten."""

MOST_STEPS_PER_SECOND = 4_000
"""Of this model; the fit ends when the time is up."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--rows", type=int, default=5_000_000)
    options.add_argument("--interval", type=float, default=5, help="seconds between readings")
    options.add_argument("--output", type=Path, default=Path("soak"))
    options.add_argument("--page", type=Path, help="file to put the verdict into")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.parquet", chosen.rows)
        watch = Watch(chosen.minutes * 60, chosen.interval)
        fit(Path(folder), watch, int(MOST_STEPS_PER_SECOND * 60 * chosen.minutes))
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
        self._seconds = seconds
        self._interval = interval
        self._start = self._next = time.monotonic()
        self.readings: list[dict[str, float]] = []

    def __call__(self, approx, losses, i: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        if i == 1:
            self._start = now
        self._next = now + self._interval
        self.readings.append(
            {
                "seconds": round(now - self._start, 1),
                "steps": i,
                "rss_mb": round(resident_mb(), 2),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
            }
        )
        if now - self._start >= self._seconds:
            raise StopIteration("the time is up")

    def report(self) -> dict:
        """Return the readings and what they come to."""
        quarters = np.array_split(np.array(self.readings), 4)
        early, late = quarters[1], quarters[3]
        growth = {
            "mb": round(median_mb(late) - median_mb(early), 1),
            "files": max(r["files"] for r in late) - max(r["files"] for r in early),
            "threads": max(r["threads"] for r in late) - max(r["threads"] for r in early),
        }
        last = self.readings[-1]
        return {
            "steps": last["steps"],
            "steps_per_second": round(last["steps"] / last["seconds"], 1),
            "growth": growth,
            "flat": growth["mb"] < ALLOWED_MB and max(growth["files"], growth["threads"]) <= 0,
            "readings": self.readings,
        }


def median_mb(readings: Iterable[dict]) -> float:
    return float(np.median([r["rss_mb"] for r in readings]))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_rows(path: Path, n_rows: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_rows, 3)).astype("float32")
    up = rng.random(n_rows) < 1 / (1 + np.exp(-(0.3 + x @ [0.5, -0.4, 0.8])))
    columns = dict(zip(("mid", "spread", "imbalance"), x.T), up=up.astype("int8"))
    pq.write_table(pa.table(columns), path, row_group_size=250_000)


def fit(folder: Path, watch: Watch, n_steps: int) -> None:
    buffer = shuffle_buffer(
        parquet_source(folder / "rows.parquet"), buffer_size=500_000, batch_size=4096, seed=0
    )
    ds = StreamingDataset(buffer, batch_size=4096)
    with pm.Model():
        logistic([ds[name] for name in ds.columns or ()], ds.total_size)
        resumable_fit(
            pm.ADVI(random_seed=0),
            n_steps,
            path=folder / "soak.fit",
            datasets=[ds],
            callbacks=[watch],
            progressbar=False,
            obj_optimizer=pm.adam(learning_rate=0.01),
        )


def plot(report: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    minutes = [r["seconds"] / 60 for r in report["readings"]]
    names = {"rss_mb": "resident MB", "files": "open files", "threads": "threads"}
    for axes, (key, label) in zip(figure.subplots(3, sharex=True), names.items()):
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
