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
"""One pass over a table, to read, shuffle, check or preshuffle it, and steps of fits."""

import shutil

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data import Data
from benchmarks.fits import in_memory_columns, on_one_batch, on_stream
from benchmarks.orderbook.experiment import peak_growth
from benchmarks.preshuffle_speed import copy_plain, shuffle_ours
from benchmarks.suites import N_STEPS, case_of, epoch, exhaust, fit, raw_scan
from benchmarks.turns import Runner
from pymc.variational.streaming import check_order, parquet_source

WINDOWS = 20
MEMORY_LIMIT = "128MB"


class TableSuite:
    """Order-book tables of two sizes, in order of time and preshuffled, written once."""

    params = [[200_000, 2_000_000]]
    param_names = ["n_rows"]
    number = 1
    rounds = 1
    repeat = (3, 9, 10.0)
    warmup_time = 0.0
    timeout = 300.0

    def setup_cache(self) -> Any:
        data = Data(Path.cwd(), max(self.params[0]))
        for n_rows in self.params[0]:
            data.shuffled(data.order_book(n_rows))
        return data


class ReadingSuite(TableSuite):
    def time_preshuffled(self, data: Data, n_rows: int) -> None:
        exhaust(parquet_source(data.shuffled(data.order_book(n_rows))))

    def time_preshuffled_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.shuffled(data.order_book(n_rows)))

    def time_as_it_comes(self, data: Data, n_rows: int) -> None:
        exhaust(parquet_source(data.order_book(n_rows)))

    def time_raw_scan(self, data: Data, n_rows: int) -> None:
        raw_scan(data.order_book(n_rows))


class EpochSuite(TableSuite):
    def time_shuffle_buffer(self, data: Data, n_rows: int) -> None:
        epoch(case_of(data, n_rows), order_check="off")

    def time_watched(self, data: Data, n_rows: int) -> None:
        epoch(case_of(data, n_rows))

    def time_check_order(self, data: Data, n_rows: int) -> None:
        check_order(parquet_source(data.order_book(n_rows)), buffer_size=n_rows // WINDOWS)

    def track_peak(self, data: Data, n_rows: int) -> float:
        return peak_growth(epoch, case_of(data, n_rows))

    track_peak.unit = "MB"  # type: ignore[attr-defined]


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


class StreamSuite(TableSuite):
    """Steps of a fit; each way of fitting is a suite, so that ``setup`` compiles no others."""

    make: Callable[..., Runner] = staticmethod(on_stream)

    def setup(self, data: Data, n_rows: int) -> None:
        self.runner = self.make(case_of(data, n_rows))

    def time_steps(self, data: Data, n_rows: int) -> None:
        self.runner.run(N_STEPS)

    def track_memory(self, data: Data, n_rows: int) -> float:
        """Return the growth of the peak memory from before the model is built to the end."""
        return peak_growth(fit, self.make, case_of(data, n_rows))

    track_memory.unit = "MB"  # type: ignore[attr-defined]


class OneBatchSuite(StreamSuite):
    make = staticmethod(on_one_batch)


class MinibatchSuite(StreamSuite):
    make = staticmethod(in_memory_columns)
