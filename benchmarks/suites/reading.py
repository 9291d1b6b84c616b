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
"""Reading a table once."""

from benchmarks.data import Data
from benchmarks.peers import fetch_dataloader, load_dataloader
from benchmarks.suites.common import TableSuite, exhaust, peak_growth, raw_scan, read, unit


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
