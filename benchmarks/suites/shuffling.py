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
"""One epoch through a shuffle buffer."""

import numpy as np

from benchmarks.data import Data
from benchmarks.orderbook.experiment import BATCH_SIZE
from benchmarks.peers import fetch_dataloader, load_dataloader
from benchmarks.suites.common import (
    BUFFER_SIZE,
    TableSuite,
    exhaust,
    peak_growth,
    read,
    shuffle,
    unit,
)
from pymc.variational.streaming import parquet_source


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
