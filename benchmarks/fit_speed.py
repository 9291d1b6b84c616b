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
"""How fast a fit is on a stream, beside a batch that never changes and ``pm.Minibatch``.

    python -m benchmarks.fit_speed --page docs/source/speed.md

All fits are compiled first and run long enough to fill their windows; then they take turns, some
thousand steps at a time, so that whatever else the machine does meets all of them.  The fit on one
batch is the limit: it reads nothing.  Processor time is that of all threads of the process.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytensor

import pymc as pm

from benchmarks.orderbook.experiment import BATCH_SIZE, build_model, logistic
from benchmarks.orderbook.rows import write_rows
from benchmarks.pages import filled
from pymc.variational.streaming import parquet_source, preshuffle

COMMAND = "python -m benchmarks.fit_speed"
BUFFER_SIZE = 1_000_000
LIMIT = "one batch, again and again"


@dataclass(slots=True)
class Lane:
    """A fit that takes turns with others."""

    inference: pm.ADVI
    seconds: list[float] = field(default_factory=list)
    """Of a step, one for each turn."""
    processor_seconds: list[float] = field(default_factory=list)

    def run(self, n_steps: int) -> None:
        start, processor_start = time.perf_counter(), time.process_time()
        self.inference.refine(n_steps, progressbar=False)
        self.seconds.append((time.perf_counter() - start) / n_steps)
        self.processor_seconds.append((time.process_time() - processor_start) / n_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps per second of fits that take turns.")
    parser.add_argument("--rows", type=float, default=20e6)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2_000, help="of each turn")
    parser.add_argument("--folder", type=Path, help="for the data; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the table into")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # the rows in order of time are meant to be
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        lanes = make_lanes(Path(folder), int(chosen.rows))
        for _ in range(chosen.turns):
            for lane in lanes.values():
                lane.run(chosen.steps)
        text = make_table(lanes)
    sys.stdout.write(text)
    if chosen.page is not None:
        chosen.page.write_text(filled(chosen.page.read_text(), "speed", COMMAND, text))


def make_lanes(folder: Path, n_rows: int) -> dict[str, Lane]:
    ordered, shuffled = folder / "ordered", folder / "shuffled"
    write_rows(ordered, rows=n_rows, seed=0)
    preshuffle(ordered, shuffled, seed=0, progressbar=False)
    return {
        LIMIT: make_lane(lambda: one_batch(ordered, n_rows)),
        "stream, preshuffled": make_lane(lambda: from_table(shuffled, BUFFER_SIZE)),
        "stream, as it comes (zstd, dictionaries)": make_lane(
            lambda: from_table(ordered, BUFFER_SIZE)
        ),
        "`pm.Minibatch`, in memory": make_lane(lambda: from_table(shuffled, None)),
    }


def make_lane(make: Callable[[], list]) -> Lane:
    """Compile a fit, and let it fill its windows."""
    with pm.Model():
        callbacks = make()
        inference = pm.ADVI()
        inference.fit(
            2 * BUFFER_SIZE // BATCH_SIZE,
            callbacks=callbacks,
            progressbar=False,
            obj_optimizer=pm.adam(learning_rate=1e-3),
        )
    return Lane(inference)


def one_batch(rows: Path, n_rows: int) -> list:
    batch = next(iter(parquet_source(rows)))[:BATCH_SIZE].astype(pytensor.config.floatX)
    buffer: Any = pytensor.shared(batch, name="batch")
    logistic([buffer[:, j] for j in range(4)], n_rows)
    return []


def from_table(rows: Path, buffer_size: int | None) -> list:
    """Observe a stream of the rows, or all of them in memory."""
    ds = build_model(rows, buffer_size, seed=0)
    return [] if ds is None else [ds.fit_callback()]


def make_table(lanes: dict[str, Lane]) -> str:
    limit = lanes[LIMIT].seconds
    text = (
        "| rows | steps/s | ms a step | processor ms a step | speed over the limit's "
        "| over `pm.Minibatch`'s |\n|---|---|---|---|---|---|\n"
    )
    memory = list(lanes.values())[-1].seconds
    for name, lane in lanes.items():
        seconds = statistics.median(lane.seconds)
        text += (
            f"| {name} | {1 / seconds:,.0f} | {1e3 * seconds:.2f} "
            f"| {1e3 * statistics.median(lane.processor_seconds):.2f} "
            f"| {ratio(limit, lane.seconds):.2f} | {ratio(memory, lane.seconds):.2f} |\n"
        )
    return text


def ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours))


if __name__ == "__main__":
    main()
