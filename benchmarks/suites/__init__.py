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

Beside each number are its baselines.  Peaks of memory are tracked in processes of their own: those
that ``peakmem_`` would tell include what the parent process once held.  What runs in these
processes is here, since the runner imports the suites under names that they do not find.
"""

import warnings

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.data import Data
from benchmarks.fits import Case, order_book, stream
from benchmarks.orderbook.experiment import parquet_files
from benchmarks.turns import Runner

BUFFER_SIZE = 100_000
N_STEPS = 500


def exhaust(blocks: Iterable[Any]) -> None:
    for _ in blocks:
        pass


def case_of(data: Data, n_rows: int) -> Case:
    return Case(data.shuffled(data.order_book(n_rows)), order_book, buffer_size=BUFFER_SIZE)


def epoch(case: Case, **options: Any) -> None:
    """Stream all rows once, without a model."""
    with warnings.catch_warnings(), stream(case, cycle=False, **options) as ds:
        warnings.simplefilter("ignore")  # the epoch ends with rows left over
        while ds.advance():
            pass


def fit(make: Callable[..., Runner], case: Case) -> None:
    make(case).run(N_STEPS)


def raw_scan(rows: Path) -> None:
    """Decode a table with pyarrow alone."""
    for file in parquet_files(rows):
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as parquet:
            exhaust(parquet.iter_batches(use_threads=False))
