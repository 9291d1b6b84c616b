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
"""Passes over a table: reading, shuffling in a buffer, checking the order, shuffling on disk."""

import shutil
import warnings

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.data import Data
from benchmarks.orderbook.experiment import BATCH_SIZE
from benchmarks.peers import fetch_dataloader, load_dataloader
from benchmarks.preshuffle_speed import copy_plain, shuffle_duckdb, shuffle_ours
from benchmarks.suites.common import (
    BUFFER_SIZE,
    TableSuite,
    exhaust,
    peak_growth,
    raw_scan,
    read,
    shuffle,
    unit,
)
from pymc.variational.streaming import (
    OrderReport,
    StreamingDataset,
    check_order,
    parquet_source,
    shuffle_buffer,
)

WINDOWS = 20
MEMORY_LIMIT = "128MB"


class ReadingSuite(TableSuite):
    def time_preshuffled(self, data: Data, n_rows: int) -> None:
        read(data.shuffled(data.order_book(n_rows)))

    def time_preshuffled_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.shuffled(data.order_book(n_rows)))

    def time_as_it_comes(self, data: Data, n_rows: int) -> None:
        read(data.order_book(n_rows))

    def time_as_it_comes_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.order_book(n_rows))

    def time_as_it_comes_dataloader(self, data: Data, n_rows: int) -> None:
        peer = load_dataloader(fetch_dataloader(data.folder))
        exhaust(peer.parquet_source(str(data.order_book(n_rows))))

    @unit("MB")
    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(read, data.order_book(n_rows))

    @unit("MB")
    def track_peak_raw_scan(self, data: Data, n_rows: int) -> float:
        return peak_growth(raw_scan, data.order_book(n_rows))


class ShufflingSuite(TableSuite):
    def time_shuffle_buffer(self, data: Data, n_rows: int) -> None:
        shuffle(data.shuffled(data.order_book(n_rows)))

    def time_without(self, data: Data, n_rows: int) -> None:
        read(data.shuffled(data.order_book(n_rows)))

    def time_dataloader(self, data: Data, n_rows: int) -> None:
        peer = load_dataloader(fetch_dataloader(data.folder))
        source = peer.parquet_source(str(data.shuffled(data.order_book(n_rows))))
        shuffled = peer.shuffle_buffer(
            source.__iter__, buffer_size=BUFFER_SIZE, batch_size=BATCH_SIZE, seed=0
        )
        exhaust(shuffled())

    def time_in_memory(self, data: Data, n_rows: int) -> None:
        rows = np.concatenate(list(parquet_source(data.shuffled(data.order_book(n_rows)))))
        np.random.default_rng(0).shuffle(rows)

    @unit("MB")
    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(shuffle, data.shuffled(data.order_book(n_rows)))


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


class _TargetSuite(TableSuite):
    def setup(self, data: Data, n_rows: int) -> None:
        self.target = data.folder / "target"

    def teardown(self, data: Data, n_rows: int) -> None:
        shutil.rmtree(self.target, ignore_errors=True)


class PreshuffleSuite(_TargetSuite):
    def time_preshuffle(self, data: Data, n_rows: int) -> None:
        shuffle_ours(data.order_book(n_rows), self.target, MEMORY_LIMIT)

    def time_plain_copy(self, data: Data, n_rows: int) -> None:
        copy_plain(data.order_book(n_rows), self.target, MEMORY_LIMIT)

    @unit("MB")
    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(shuffle_ours, data.order_book(n_rows), self.target, MEMORY_LIMIT)


class DuckDBSuite(_TargetSuite):
    """DuckDB's random order under the same limit, where DuckDB is installed."""

    def setup(self, data: Data, n_rows: int) -> None:
        if find_spec("duckdb") is None:
            raise NotImplementedError("duckdb is not installed")
        super().setup(data, n_rows)

    def time_random_order(self, data: Data, n_rows: int) -> None:
        shuffle_duckdb(data.order_book(n_rows), self.target, MEMORY_LIMIT)
