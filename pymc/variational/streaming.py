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
"""Minibatch variational inference on data that stream from disk.

The rows of a table that does not fit in memory pass through a bounded buffer, batch by
batch, into a shared variable of the model; a callback of :func:`pymc.fit` puts the next
batch in after each step::

    ds = StreamingDataset(
        shuffle_buffer(parquet_source("shuffled/"), buffer_size=1_000_000, batch_size=4096),
        batch_size=4096,
    )
    with pm.Model():
        mu = pm.Normal("mu")
        pm.Normal("y", mu, observed=ds["y"], total_size=ds.total_size)
        approx = pm.fit(20_000, callbacks=[ds.fit_callback()])

Where the data fit in memory, :func:`pymc.Minibatch` is simpler.
"""

import sys

from pymc.variational._streaming.batches.window import shuffle_buffer
from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import (
    OrderError,
    OrderWarning,
    StreamError,
    StreamWarning,
)
from pymc.variational._streaming.fit.average import CheckNoiseFloor, EpochAverage
from pymc.variational._streaming.fit.check import check_fit
from pymc.variational._streaming.fit.polish import polish
from pymc.variational._streaming.fit.predict import LogScore, log_score, predict
from pymc.variational._streaming.fit.report import FitReport
from pymc.variational._streaming.fit.resume import resumable_fit
from pymc.variational._streaming.order.check import check_order
from pymc.variational._streaming.order.report import OrderReport
from pymc.variational._streaming.preshuffle.cli import main
from pymc.variational._streaming.preshuffle.command import PreshuffleReport, preshuffle
from pymc.variational._streaming.sources.arrow import arrow_source
from pymc.variational._streaming.sources.parquet.parquet import parquet_source
from pymc.variational._streaming.sources.summary import Summary
from pymc.variational._streaming.sources.tables import summarize

__all__ = [
    "CheckNoiseFloor",
    "EpochAverage",
    "FitReport",
    "LogScore",
    "OrderError",
    "OrderReport",
    "OrderWarning",
    "PreshuffleReport",
    "StreamError",
    "StreamWarning",
    "StreamingDataset",
    "Summary",
    "arrow_source",
    "check_fit",
    "check_order",
    "log_score",
    "parquet_source",
    "polish",
    "predict",
    "preshuffle",
    "resumable_fit",
    "shuffle_buffer",
    "summarize",
]

if __name__ == "__main__":
    sys.exit(main())
