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
"""What the suites share, and what runs in processes of its own.

That cannot be in the suites: the runner imports them under names that a new process does not find.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.data import Data
from benchmarks.fits import Case, fetch_dataloader, order_book
from benchmarks.orderbook.experiment import BATCH_SIZE, parquet_files
from benchmarks.turns import Runner
from pymc.variational.streaming import parquet_source, shuffle_buffer

BUFFER_SIZE = 100_000
N_STEPS = 500


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
        fetch_dataloader(data.folder)
        return data


def exhaust(blocks: Iterable[Any]) -> None:
    for _ in blocks:
        pass


def shuffle(rows: Path) -> None:
    source = parquet_source(rows)
    exhaust(shuffle_buffer(source, buffer_size=BUFFER_SIZE, batch_size=BATCH_SIZE, seed=0))


def case_of(data: Data, n_rows: int) -> Case:
    return Case(data.shuffled(data.order_book(n_rows)), order_book, buffer_size=BUFFER_SIZE)


def fit(make: Callable[..., Runner], case: Case) -> None:
    make(case).run(N_STEPS)


def raw_scan(rows: Path) -> None:
    """Decode a table with pyarrow alone."""
    for file in parquet_files(rows):
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
            exhaust(parquet.iter_batches(use_threads=False))
