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
"""One pass over a table, to read, shuffle, check or preshuffle it."""

import shutil
import warnings

from pathlib import Path

from benchmarks.data import Data
from benchmarks.fits import fetch_dataloader, load_dataloader
from benchmarks.orderbook.experiment import BATCH_SIZE, peak_growth
from benchmarks.preshuffle_speed import copy_plain, shuffle_ours
from benchmarks.suites.common import BUFFER_SIZE, TableSuite, exhaust, raw_scan, shuffle
from pymc.variational.streaming import (
    StreamingDataset,
    check_order,
    parquet_source,
    shuffle_buffer,
)

WINDOWS = 20
MEMORY_LIMIT = "128MB"


class ReadingSuite(TableSuite):
    def time_preshuffled(self, data: Data, n_rows: int) -> None:
        exhaust(parquet_source(data.shuffled(data.order_book(n_rows))))

    def time_preshuffled_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.shuffled(data.order_book(n_rows)))

    def time_as_it_comes(self, data: Data, n_rows: int) -> None:
        exhaust(parquet_source(data.order_book(n_rows)))

    def time_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.order_book(n_rows))

    def time_dataloader(self, data: Data, n_rows: int) -> None:
        peer = load_dataloader(fetch_dataloader(data.folder))
        exhaust(peer.parquet_source(str(data.order_book(n_rows))))


class ShufflingSuite(TableSuite):
    def time_shuffle_buffer(self, data: Data, n_rows: int) -> None:
        shuffle(data.shuffled(data.order_book(n_rows)))

    def time_dataloader(self, data: Data, n_rows: int) -> None:
        peer = load_dataloader(fetch_dataloader(data.folder))
        source = peer.parquet_source(str(data.shuffled(data.order_book(n_rows))))
        shuffled = peer.shuffle_buffer(
            source.__iter__, buffer_size=BUFFER_SIZE, batch_size=BATCH_SIZE, seed=0
        )
        exhaust(shuffled())

    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(shuffle, data.shuffled(data.order_book(n_rows)))

    track_peak.unit = "MB"  # type: ignore[attr-defined]


class OrderSuite(TableSuite):
    def time_check_order(self, data: Data, n_rows: int) -> None:
        check_order(parquet_source(data.order_book(n_rows)), buffer_size=n_rows // WINDOWS)

    def time_watched_epoch(self, data: Data, n_rows: int) -> None:
        _stream(data.shuffled(data.order_book(n_rows)), n_rows)

    def time_unwatched_epoch(self, data: Data, n_rows: int) -> None:
        _stream(data.shuffled(data.order_book(n_rows)), n_rows, order_check="off")


def _stream(rows: Path, n_rows: int, **options) -> None:
    buffer = shuffle_buffer(
        parquet_source(rows), buffer_size=n_rows // WINDOWS, batch_size=BATCH_SIZE, seed=0
    )
    ds = StreamingDataset(buffer, batch_size=BATCH_SIZE, cycle=False, **options)
    with warnings.catch_warnings(), ds:
        warnings.simplefilter("ignore")  # the epoch ends with rows left over
        while ds.advance():
            pass


class PreshuffleSuite(TableSuite):
    def setup(self, data: Data, n_rows: int) -> None:
        self.target = data.folder / "target"

    def teardown(self, data: Data, n_rows: int) -> None:
        shutil.rmtree(self.target, ignore_errors=True)

    def time_preshuffle(self, data: Data, n_rows: int) -> None:
        shuffle_ours(data.order_book(n_rows), self.target, MEMORY_LIMIT)

    def time_plain_copy(self, data: Data, n_rows: int) -> None:
        copy_plain(data.order_book(n_rows), self.target, MEMORY_LIMIT)

    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(shuffle_ours, data.order_book(n_rows), self.target, MEMORY_LIMIT)

    track_peak.unit = "MB"  # type: ignore[attr-defined]
