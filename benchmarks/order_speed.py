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
"""What the order check costs, before a fit and while the rows stream, and the batch contract.

    python -m benchmarks.order_speed --page docs/source/speed.md

The first table is of the order books, in order of time.  The second is of several models on random
rows: by how much the contract makes a step longer, of fits with and without it in turns, and the
processor time of the order check in the thread that reads; ``--only checks`` leaves out the first.
"""

import argparse
import statistics
import sys
import tempfile
import time

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor.tensor as pt

import pymc as pm

from benchmarks.orderbook.rows import write_rows
from benchmarks.pages import filled
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.statistic import ModelScore, Statistic
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import (
    StreamingDataset,
    check_order,
    parquet_source,
    shuffle_buffer,
)

COMMAND = "python -m benchmarks.order_speed"
SIZES = 1_000_000, 10_000_000, 100_000_000
WINDOW = 1_000_000
WATCHED_WINDOWS = 4
BATCH = 4_096
REPEATS = 5
TURNS = 20
STEPS = 400
ROWS = 1_000_000
WINDOWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="What the order check costs.")
    parser.add_argument("--folder", type=Path, help="for the data; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the table into")
    parser.add_argument("--only", choices=["order", "checks"], help="one of the tables")
    chosen = parser.parse_args()
    tables = {"order": lambda: order_table(chosen.folder), "checks": checks_table}
    for name in [chosen.only] if chosen.only else tables:
        text = tables[name]()
        sys.stdout.write(text)
        if chosen.page is not None:
            page = chosen.page.read_text()
            chosen.page.write_text(filled(page, name, COMMAND, text))


def order_table(parent: Path | None) -> str:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        return make_table([measure(Path(folder), n_rows) for n_rows in SIZES])


def measure(folder: Path, n_rows: int) -> tuple[int, float, float]:
    """Return the rows, seconds of the check before the fit, and of one batch while it streams."""
    rows = folder / f"{n_rows}"
    write_rows(rows, rows=n_rows, seed=0)
    source = parquet_source(rows)
    before = median_seconds(lambda: check_order(source, buffer_size=WINDOW))
    buffer = shuffle_buffer(source, buffer_size=WINDOW, batch_size=BATCH, seed=0)
    blocks = list(islice(buffer.blocks(), WATCHED_WINDOWS))
    n_watched = sum(len(block) for block in blocks)
    watched = median_seconds(lambda: watch(buffer, blocks))
    return n_rows, before, watched * BATCH / n_watched


def watch(buffer: ShuffleBuffer, blocks: list) -> None:
    """Compare blocks by the score of the order books' model."""
    monitor = Monitor(Stream(buffer.source, WINDOW, buffer.n_rows), scored)
    offset = 0
    for block in blocks:
        monitor.add(offset, block)
        monitor.compare()
        offset += len(block)


@cache
def order_book_score() -> ModelScore:
    ds = StreamingDataset(np.zeros((1, 4)), batch_size=1, total_size=1, order_check="off")
    with pm.Model() as model:
        b, x = pm.Normal("b", 0, 3, shape=4), pt.as_tensor(ds.as_tensor())
        logit = b[0] + b[1] * x[:, 0] + b[2] * x[:, 1] + b[3] * x[:, 2]
        pm.Bernoulli("up", logit_p=logit, observed=x[:, 3], total_size=1)
    return ModelScore(model, ds.as_tensor())


class Scored:
    """Make the score once: a fit pays for it once, and not for each batch."""

    made: Statistic | None = None

    def __call__(self, pilot: np.ndarray) -> Statistic:
        self.made = self.made or order_book_score().at(pilot, max(SIZES))
        assert self.made is not None
        return self.made


scored = Scored()


def median_seconds(function: Callable[[], object]) -> float:
    return statistics.median(islice(_timed(function), REPEATS))


def _timed(function: Callable[[], object]) -> Iterator[float]:
    while True:
        start = time.perf_counter()
        function()
        yield time.perf_counter() - start


def make_table(lines: list[tuple[int, float, float]]) -> str:
    text = "| rows | before the fit, s | while streaming, ms per 4,096 rows |\n|---|---|---|\n"
    for n_rows, before, watched in lines:
        text += f"| {n_rows:,} | {before:.2f} | {watched * 1e3:.3f} |\n"
    return text


def order_book(ds: StreamingDataset) -> None:
    b, x = pm.Normal("b", 0, 3, shape=4), pt.as_tensor(ds.as_tensor())
    logit = b[0] + b[1] * x[:, 0] + b[2] * x[:, 1] + b[3] * x[:, 2]
    pm.Bernoulli("up", logit_p=logit, observed=x[:, 4], total_size=ds.total_size)


def rare_events(ds: StreamingDataset) -> None:
    b, x = pm.Normal("b", 0, 3, shape=4), pt.as_tensor(ds.as_tensor())
    logit = b[0] + b[1] * x[:, 0] + b[2] * x[:, 1] + b[3] * x[:, 2]
    pm.Bernoulli("event", logit_p=logit, observed=x[:, 7], total_size=ds.total_size)


def groups(ds: StreamingDataset) -> None:
    a, x = pm.Normal("a", 0, pm.HalfNormal("s"), shape=100), pt.as_tensor(ds.as_tensor())
    rate = pm.math.exp(a[x[:, 3].astype("int64")] + pm.Normal("b") * x[:, 0])
    pm.Poisson("n", rate, observed=x[:, 4], total_size=ds.total_size)


def cells(ds: StreamingDataset) -> None:
    a, x = pm.Normal("a", shape=200), pt.as_tensor(ds.as_tensor())
    logit = a[(2 * x[:, 3] + x[:, 4]).astype("int64")] + pm.Normal("b") * x[:, 0]
    pm.Bernoulli("y", logit_p=logit, observed=x[:, 5], total_size=ds.total_size)


def trials(ds: StreamingDataset) -> None:
    x = pt.as_tensor(ds.as_tensor())
    logit = pm.Normal("a") + pm.Normal("b") * x[:, 0]
    pm.Binomial("y", x[:, 3] + 1, logit_p=logit, observed=x[:, 6], total_size=ds.total_size)


MODELS = {
    "logistic regression, four columns and a label": order_book,
    "logistic regression, one event in a hundred rows": rare_events,
    "hierarchical Poisson regression, 100 groups": groups,
    "logistic regression, an index of two columns": cells,
    "binomial regression, trials by row": trials,
}


def checks_table() -> str:
    text = (
        "| model | step, ms | longer with the batch contract, µs | | order check, µs | |\n"
        "|---|---|---|---|---|---|\n"
    )
    rng = np.random.default_rng(0)
    x, number = rng.normal(size=(ROWS, 3)), rng.integers(0, 100, ROWS)
    labels, counts = rng.integers(0, 2, (ROWS, 2)), rng.integers(0, number + 2)
    columns = [x, number, labels, counts, rng.random(ROWS) < 0.01]
    rows = np.column_stack(columns).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(list(rows.T), names=list("abcdefgh")), f"{folder}/rows.parquet")
        for name, observe in MODELS.items():
            turns = list(islice(_turns(folder, observe), TURNS + 3))[3:]
            free, held = np.median(turns, axis=0)
            watched = _watch_seconds(rows, observe)
            text += (
                f"| {name} | {free * 1e3:.3f} | {(held - free) * 1e6:.1f} | {held / free - 1:.1%} "
                f"| {watched * 1e6:.1f} | {watched / free:.1%} |\n"
            )
    return text


def _turns(folder: str, observe: Callable) -> Iterator[tuple[float, ...]]:
    """Yield seconds of a step without and with the contract."""
    streams = [
        StreamingDataset(parquet_source(folder), batch_size=BATCH, order_check="off")
        for _ in range(2)
    ]
    with streams[0], streams[1]:
        steps = [_Step(ds, observe) for ds in streams]
        streams[0]._reader.hold_to(None)
        for turn in count():  # each begins in every second turn
            seconds = {i: _seconds(steps[i]) for i in ((0, 1) if turn % 2 else (1, 0))}
            yield seconds[0], seconds[1]


def _watch_seconds(rows: np.ndarray, observe: Callable) -> float:
    """Return the processor seconds of comparing the rows of a batch, of many windows."""
    with StreamingDataset(rows, batch_size=BATCH, order_check="off") as ds:
        with pm.Model() as model:
            observe(ds)
        score = ModelScore(model, ds.as_tensor()).at(rows[:BATCH], max(SIZES))
    assert score is not None
    found = []
    for _ in range(REPEATS):
        monitor = Monitor(Stream(as_source(rows), ROWS, max(SIZES)), lambda pilot: score)
        start = time.thread_time()
        for window in range(WINDOWS):
            monitor.add(window * ROWS, rows)
            monitor.compare()
        found.append(time.thread_time() - start)
    return statistics.median(found) * BATCH / (WINDOWS * ROWS)


class _Step:
    """A step of a fit, and the batch after it."""

    def __init__(self, ds: StreamingDataset, observe: Callable):
        with pm.Model():
            observe(ds)
            self._callback = ds.fit_callback()
            self._step = pm.ADVI().objective.step_function(score=True, obj_optimizer=pm.adam())
        self._advance = ds._advance

    def __call__(self) -> None:
        self._step()
        self._advance()


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
