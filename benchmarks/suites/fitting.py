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
"""Steps of a fit, its memory, and how far its posterior is from others."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Data
from benchmarks.fits import (
    Case,
    in_memory_columns,
    on_dataloader,
    on_one_batch,
    on_stream,
    order_book,
)
from benchmarks.orderbook.experiment import Fit, Posterior, exact_posterior, fit_model, in_process
from benchmarks.peers import fetch_dataloader
from benchmarks.suites.common import BUFFER_SIZE, N_STEPS, TableSuite, fit, peak_growth, unit
from benchmarks.turns import Runner

N_STEPS_OF_FIT = 6_000


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


class DriftSuite(TableSuite):
    """Posterior means, averaged over the second half of a fit; the worst of them."""

    def setup_cache(self) -> Any:
        data = super().setup_cache()
        return {n_rows: _fits(data, n_rows) for n_rows in self.params[0]}

    @unit("posterior sd")
    def track_stream_from_exact(self, fits: dict, n_rows: int) -> float:
        exact, stream, _ = fits[n_rows]
        return _distance(stream.averaged, exact.mean, exact)

    @unit("posterior sd")
    def track_minibatch_from_exact(self, fits: dict, n_rows: int) -> float:
        exact, _, in_memory = fits[n_rows]
        return _distance(in_memory.averaged, exact.mean, exact)

    @unit("posterior sd")
    def track_stream_from_minibatch(self, fits: dict, n_rows: int) -> float:
        exact, stream, in_memory = fits[n_rows]
        return _distance(stream.averaged, in_memory.averaged, exact)


def _case(data: Data, n_rows: int) -> Case:
    return Case(data.shuffled(data.order_book(n_rows)), order_book, buffer_size=BUFFER_SIZE)


def _fits(data: Data, n_rows: int) -> tuple[Posterior, Fit, Fit]:
    rows = data.shuffled(data.order_book(n_rows))
    return exact_posterior(rows), _averaged(rows, BUFFER_SIZE), _averaged(rows, None)


def _averaged(rows: Path, buffer_size: int | None) -> Fit:
    return in_process(
        fit_model,
        rows,
        buffer_size=buffer_size,
        n_steps=N_STEPS_OF_FIT,
        seed=0,
        progressbar=False,
    )


def _distance(ours: tuple, theirs: tuple, exact: Posterior) -> float:
    return float(np.abs(np.subtract(ours, theirs) / exact.sd).max())
