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
"""Summaries of sources."""

import os

from collections.abc import Iterator
from typing import Any

from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.parquet.files import inspect
from pymc.variational._streaming.sources.parquet.mark import check_marks, read_mark
from pymc.variational._streaming.sources.parquet.parquet import read_batches
from pymc.variational._streaming.sources.parquet.paths import list_parquet
from pymc.variational._streaming.sources.summary import Summarizer, Summary
from pymc.variational._streaming.utils import progress_bar

__all__ = ["summarize"]

_BATCH_ROWS = 1 << 16


def summarize(source: Any, *, progressbar: bool = True) -> Summary:
    """Summarize the columns of a table in one pass, or in none where its files hold the summary.

    Parameters
    ----------
    source : path_like, sequence of path_like, Source, data frame, Arrow table or reader, array
        Parquet files, as in :func:`parquet_source`, or anything else that can be streamed. What
        can be read only once is used up.
    progressbar : bool, default True
        Show the rows that are done, and how many are done per second.

    Returns
    -------
    Summary
        By column ``.rows`` and ``.nulls``, their numbers of values and of nulls or NaN; ``.min``,
        ``.max``, ``.mean`` and ``.sd`` (with divisor n - 1) of numbers, booleans and times (in
        seconds since 1970); and ``.levels``, up to 4,096 distinct strings or the values of a
        dictionary. It is shown as a table.

    Notes
    -----
    The summary of a table that :func:`preshuffle` wrote lies in its files, and only their footers
    are read. Some files of a table, or parts of a split, are read for numbers of their own.

    Memory is bounded by one batch of 65,536 rows, or those that the source gives.

    Examples
    --------
    >>> import pandas as pd
    >>> flights = pd.DataFrame({"distance": [100.0, 300.0, 200.0], "carrier": ["UA", "AA", "UA"]})
    >>> summary = summarize(flights, progressbar=False)
    >>> summary["distance"].mean, summary["distance"].sd
    (200.0, 100.0)
    >>> summary["carrier"].levels
    ('AA', 'UA')
    """
    paths = source if isinstance(source, list | tuple) else [source]
    if paths and all(isinstance(path, str | os.PathLike) for path in paths):
        kept, n_rows, batches = _open_files(source)
    else:
        opened = as_source(source)
        kept, n_rows, batches = opened.summary, opened.n_rows, opened.batches()
    if kept is not None and kept.rows == n_rows:
        return kept
    summarizer: Summarizer | None = None
    with progress_bar("Summarizing", n_rows, show=progressbar) as advance:
        for batch in batches:
            summarizer = summarizer or Summarizer(batch.schema)
            summarizer.add(batch)
            advance(batch.num_rows)
    if summarizer is None:
        raise ValueError("source holds no rows to summarize")
    return summarizer.finish()


def _open_files(source: Any) -> tuple[Summary | None, int | None, Iterator[Any]]:
    """Return the summary that Parquet files hold, their number of rows, and all of these."""
    fs, paths = list_parquet(source)
    footers = [inspect(fs, path) for path in paths]
    marks = {file.path: read_mark(file.path, metadata) for file, metadata in footers}
    path, metadata = footers[0][0].path, footers[0][1].metadata
    kept = Summary.from_metadata(metadata, path) if check_marks(marks, partial=True) else None
    names = footers[0][1].schema.to_arrow_schema().names
    batches = (
        batch
        for file, _ in footers
        for _, batch in read_batches(
            fs,
            file,
            columns=names,
            row_groups=range(len(file.group_rows)),
            batch_rows=_BATCH_ROWS,
        )
    )
    return kept, sum(file.n_rows for file, _ in footers), batches
