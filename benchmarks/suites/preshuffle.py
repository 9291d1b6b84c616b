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
"""Shuffling a table on disk."""

import shutil

from importlib.util import find_spec

from benchmarks.data import Data
from benchmarks.preshuffle_speed import copy_plain, shuffle_duckdb, shuffle_ours
from benchmarks.suites.common import TableSuite, peak_growth, unit

MEMORY_LIMIT = "128MB"


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
