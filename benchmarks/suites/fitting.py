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
"""Steps of a fit, and its memory."""

from benchmarks.data import Data
from benchmarks.fits import (
    Case,
    in_memory_columns,
    on_dataloader,
    on_one_batch,
    on_stream,
    order_book,
)
from benchmarks.peers import fetch_dataloader
from benchmarks.suites.common import BUFFER_SIZE, N_STEPS, TableSuite, fit, peak_growth, unit
from benchmarks.turns import Runner


class _StepsSuite(TableSuite):
    """Each fit in a suite of its own, so that ``setup`` compiles no others."""

    def make(self, case: Case, data: Data) -> Runner:
        raise NotImplementedError

    def setup(self, data: Data, n_rows: int) -> None:
        self.runner = self.make(_case(data, n_rows), data)

    def time_steps(self, data: Data, n_rows: int) -> None:
        self.runner.run(N_STEPS)


class StreamSuite(_StepsSuite):
    def make(self, case: Case, data: Data) -> Runner:
        return on_stream(case)


class OneBatchSuite(_StepsSuite):
    def make(self, case: Case, data: Data) -> Runner:
        return on_one_batch(case)


class MinibatchSuite(_StepsSuite):
    def make(self, case: Case, data: Data) -> Runner:
        return in_memory_columns(case)


class DataLoaderSuite(_StepsSuite):
    def make(self, case: Case, data: Data) -> Runner:
        return on_dataloader(case, fetch_dataloader(data.folder))


class MemorySuite(TableSuite):
    """Growth of the peak memory from before the model is built to the end of a fit."""

    @unit("MB")
    def track_stream(self, data: Data, n_rows: int) -> float:
        return peak_growth(fit, on_stream, _case(data, n_rows))

    @unit("MB")
    def track_one_batch(self, data: Data, n_rows: int) -> float:
        return peak_growth(fit, on_one_batch, _case(data, n_rows))

    @unit("MB")
    def track_minibatch(self, data: Data, n_rows: int) -> float:
        return peak_growth(fit, in_memory_columns, _case(data, n_rows))

    @unit("MB")
    def track_dataloader(self, data: Data, n_rows: int) -> float:
        wheel = fetch_dataloader(data.folder)
        return peak_growth(fit, on_dataloader, _case(data, n_rows), wheel)


def _case(data: Data, n_rows: int) -> Case:
    return Case(data.shuffled(data.order_book(n_rows)), order_book, buffer_size=BUFFER_SIZE)
