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
"""Benchmarks that Airspeed Velocity runs: ``make bench``.

One pass over a table, to read, shuffle or check it, and steps of fits; beside each number is its
baseline.  Peaks of memory are tracked in processes of their own: those that ``peakmem_`` would tell
include what the parent process once held.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks import cases
from benchmarks.cases import Case, Data
from benchmarks.harness import Runner, in_process
from pymc.variational.streaming import check_order, parquet_source

N_STEPS = 500
WINDOWS = 20
exhaust: Callable[..., object] = partial(deque, maxlen=0)


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

    def setup(self, data: Data, n_rows: int) -> None:
        self.ordered = data.order_book(n_rows)
        self.case = Case(data.shuffled(self.ordered), buffer_size=cases.SMALL_BUFFER)


class ReadingSuite(TableSuite):
    def time_preshuffled(self, data: Data, n_rows: int) -> None:
        exhaust(self.case.source)

    def time_raw_scan(self, data: Data, n_rows: int) -> None:
        """Decode a table with pyarrow alone."""
        for file in sorted(self.case.rows.glob("*.parquet")):
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
                exhaust(parquet.iter_batches(use_threads=False))

    def time_shuffle_buffer(self, data: Data, n_rows: int) -> None:
        exhaust(cases.stream(self.case))

    def time_check_order(self, data: Data, n_rows: int) -> None:
        check_order(parquet_source(self.ordered), buffer_size=n_rows // WINDOWS)


class StreamSuite(TableSuite):
    """Steps of a fit; each way of fitting is a suite, so that ``setup`` compiles no others."""

    make: Callable[..., Runner] = staticmethod(cases.on_stream)

    def setup(self, data: Data, n_rows: int) -> None:
        super().setup(data, n_rows)
        self.run, _ = self.make(self.case)

    def time_steps(self, data: Data, n_rows: int) -> None:
        self.run(N_STEPS)

    def track_memory(self, data: Data, n_rows: int) -> float:
        """Return the growth of the peak memory from before the model is built to the end."""
        return in_process(cases.peak_growth, self.make, self.case, N_STEPS)

    track_memory.unit = "MB"  # type: ignore[attr-defined]


class OneBatchSuite(StreamSuite):
    make = staticmethod(cases.on_one_batch)
