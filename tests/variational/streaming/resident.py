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
"""How much memory it takes to stream a folder."""

import time

from os import PathLike

from pymc.variational.streaming import StreamingDataset, parquet_source, shuffle_buffer
from tests.variational.streaming.memory import forget_peak, in_clean_process, peak_mb

__all__ = ["SLACK", "growth_mb"]

SLACK = 40
"""MB; the allocator's noise between two runs of one program is about 15."""
BATCH_SIZE = 4096
_SLOW_STEPS = 40
"""First steps, in which the thread gets as far ahead as it may: the peak depends on that."""


def growth_mb(folder: str | PathLike, *, buffer_size: int, n_epochs: int = 1) -> float:
    """Stream a folder in a process of its own; return by how much its memory grew, in MB."""
    return in_clean_process(_stream, folder, buffer_size, n_epochs)


def _stream(folder: str | PathLike, buffer_size: int, n_epochs: int) -> float:
    forget_peak()
    before = peak_mb()
    source = parquet_source(folder)
    buffer = shuffle_buffer(source, buffer_size=buffer_size, batch_size=BATCH_SIZE, seed=0)
    with StreamingDataset(buffer, batch_size=BATCH_SIZE) as ds:
        while ds.epoch < n_epochs:
            ds.advance()
            if ds.rows_seen < _SLOW_STEPS * BATCH_SIZE:
                time.sleep(0.02)
    return peak_mb() - before
