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
"""What the order check costs, and what it sees."""

import warnings

from pathlib import Path
from typing import Literal

from benchmarks.data import Data
from benchmarks.orderbook.experiment import BATCH_SIZE
from benchmarks.suites.common import TableSuite, raw_scan, unit
from pymc.variational.streaming import (
    OrderReport,
    StreamingDataset,
    check_order,
    parquet_source,
    shuffle_buffer,
)

WINDOWS = 20


class OrderSuite(TableSuite):
    def time_check_order(self, data: Data, n_rows: int) -> None:
        _check(data.order_book(n_rows), n_rows)

    def time_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.order_book(n_rows))

    def time_watched_epoch(self, data: Data, n_rows: int) -> None:
        _stream(data.shuffled(data.order_book(n_rows)), n_rows, "warn")

    def time_unwatched_epoch(self, data: Data, n_rows: int) -> None:
        _stream(data.shuffled(data.order_book(n_rows)), n_rows, "off")

    @unit("design effect")
    def track_in_order_of_time(self, data: Data, n_rows: int) -> float:
        return _check(data.order_book(n_rows), n_rows).design_effect

    @unit("design effect")
    def track_preshuffled(self, data: Data, n_rows: int) -> float:
        return _check(data.shuffled(data.order_book(n_rows)), n_rows).design_effect


def _check(rows: Path, n_rows: int) -> OrderReport:
    return check_order(parquet_source(rows), buffer_size=n_rows // WINDOWS)


def _stream(rows: Path, n_rows: int, order_check: Literal["warn", "off"]) -> None:
    buffer = shuffle_buffer(
        parquet_source(rows), buffer_size=n_rows // WINDOWS, batch_size=BATCH_SIZE, seed=0
    )
    ds = StreamingDataset(buffer, batch_size=BATCH_SIZE, cycle=False, order_check=order_check)
    with warnings.catch_warnings(), ds:
        warnings.simplefilter("ignore")  # the epoch ends with rows left over
        while ds.advance():
            pass
