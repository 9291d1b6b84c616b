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
"""Steps of fits, each in a suite of its own, so that ``setup`` compiles no others."""

from collections.abc import Callable

from benchmarks.data import Data
from benchmarks.fits import in_memory_columns, on_dataloader, on_one_batch, on_stream
from benchmarks.orderbook.experiment import peak_growth
from benchmarks.suites.common import N_STEPS, TableSuite, case_of, fit
from benchmarks.turns import Runner


class StreamSuite(TableSuite):
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


class DataLoaderSuite(StreamSuite):
    make = staticmethod(on_dataloader)
