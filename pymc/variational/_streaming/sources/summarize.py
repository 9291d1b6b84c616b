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

from typing import Any

from pymc.variational._streaming.sources.base import Source
from pymc.variational._streaming.sources.summary import Summarizer, Summary
from pymc.variational._streaming.sources.tables import conform, open_table, plain_schema
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
    if isinstance(source, Source) and source.summary and source.summary.rows == source.n_rows:
        return source.summary
    table = open_table(source)
    if table.summary is not None and table.summary.rows == table.n_rows:
        return table.summary
    plain, summarizer = plain_schema(table.schema), Summarizer(table.schema)
    with progress_bar("Summarizing", table.n_rows, show=progressbar) as advance:
        for batch in table.read(_BATCH_ROWS, advance):
            summarizer.add_dictionaries(batch)
            summarizer.add(conform(batch, plain))
    return summarizer.finish()
