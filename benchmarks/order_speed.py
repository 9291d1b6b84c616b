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
"""What the order check costs, before a fit and while the rows stream.

    python -m benchmarks.order_speed --page docs/source/speed.md

The table is that of the order books, in order of time.
"""

import argparse
import statistics
import sys
import tempfile
import time

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytensor.tensor as pt

import pymc as pm

from benchmarks.orderbook.rows import write_rows
from benchmarks.pages import filled
from pymc.variational._streaming.batches.window import ShuffleBuffer
from pymc.variational._streaming.order.features import Statistic
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.score import ModelScore
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


def main() -> None:
    parser = argparse.ArgumentParser(description="What the order check costs.")
    parser.add_argument("--folder", type=Path, help="for the data; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the table into")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        text = make_table([measure(Path(folder), n_rows) for n_rows in SIZES])
    sys.stdout.write(text)
    if chosen.page is not None:
        page = chosen.page.read_text()
        chosen.page.write_text(filled(page, "order", COMMAND, text))


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


if __name__ == "__main__":
    main()
