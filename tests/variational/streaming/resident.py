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
"""Stream a folder in a process of its own, and print by how much resident memory grew, in MB."""

import sys
import time

from benchmarks.memory import forget_peak, peak_mb
from pymc.variational.streaming import StreamingDataset, parquet_source, shuffle_buffer

BATCH_SIZE = 4096
_SLOW_STEPS = 40
"""First steps, in which the thread gets as far ahead as it may: the peak depends on that."""


def main(folder: str, buffer_size: str, n_epochs: str) -> None:
    forget_peak()
    before = peak_mb()
    buffer = shuffle_buffer(
        parquet_source(folder), buffer_size=int(buffer_size), batch_size=BATCH_SIZE, seed=0
    )
    with StreamingDataset(buffer, batch_size=BATCH_SIZE) as ds:
        while ds.epoch < int(n_epochs):
            ds.advance()
            if ds.rows_seen < _SLOW_STEPS * BATCH_SIZE:
                time.sleep(0.05)
    sys.stdout.write(f"{peak_mb() - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
