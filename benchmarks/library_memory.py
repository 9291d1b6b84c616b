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
"""How much memory libraries take that hand rows to a stream, beside what the stream takes.

    python -m benchmarks.library_memory --page docs/source/speed.md

The peak of the resident memory of a process of its own, from before the first row to the end of an
epoch through a shuffle buffer of 100,000 rows.  Libraries that are not installed are left out.
"""

import os
import warnings

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.data import Data
from benchmarks.orderbook.experiment import peak_growth
from benchmarks.pages import markdown, measure

COMMAND = "python -m benchmarks.library_memory"
QUERY = "SELECT mid, spread, imbalance, up FROM '*.parquet' WHERE spread > 0.01"


def duckdb(method: str = "sql", query: str = QUERY) -> Any:
    from duckdb import connect

    connection = connect(config={"memory_limit": "200MB"} if "ORDER BY" in query else {})
    return getattr(connection, method)(query).to_arrow_reader(65_536)


def polars() -> Any:
    import polars as pl

    return pl.scan_parquet("*.parquet").filter(pl.col("spread") > 0.01)


def dataset() -> Any:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(".").to_batches()


def dask() -> Any:
    from dask.dataframe import read_parquet

    for part in read_parquet(".", split_row_groups=1).partitions:
        yield part.compute(scheduler="synchronous")


def ray() -> Any:
    from ray.data import read_parquet

    return read_parquet(".").iter_batches(batch_size=65_536, batch_format="pyarrow")


READERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "DuckDB, `connection.sql(...)`": ("duckdb", duckdb),
    "DuckDB, `connection.execute(...)`": ("duckdb", partial(duckdb, "execute")),
    "DuckDB, `ORDER BY` under a `memory_limit` of 200 MB": (
        "duckdb",
        partial(duckdb, query=QUERY + " ORDER BY mid"),
    ),
    "Polars, `collect_batches`": ("polars", lambda: polars().collect_batches(chunk_size=65_536)),
    'Polars, `collect(engine="streaming")`': (
        "polars",
        lambda: polars().collect(engine="streaming"),
    ),
    "`pyarrow.dataset(...).to_batches()`": ("pyarrow", dataset),
    "Dask, by row groups": ("dask.dataframe", dask),
    "Ray Data": ("ray", ray),
}


def make_table(data: Data) -> str:
    sizes = data.n_rows // 60, data.n_rows // 3, data.n_rows
    lines = []
    for name, (module, _) in READERS.items():
        if find_spec(module.split(".")[0]):
            grown = (peak_growth(read_epoch, name, data.order_book(size)) for size in sizes)
            lines.append([name, *(f"{mb:.0f}" for mb in grown)])
    return markdown("| " + " | ".join(f"{size / 1e6:g} million rows" for size in sizes), lines)


def read_epoch(name: str, book: Path) -> None:
    from pymc.variational.streaming import StreamingDataset, arrow_source, shuffle_buffer

    os.chdir(book)
    source = arrow_source(READERS[name][1])
    buffer = shuffle_buffer(source, buffer_size=100_000, batch_size=4_096, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = StreamingDataset(
            buffer, batch_size=4_096, total_size=1, order_check="off", cycle=False
        )
        while ds.advance():
            pass


if __name__ == "__main__":
    measure(COMMAND, {"libraries": make_table}, rows=30e6)
