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

import argparse
import os
import subprocess
import sys
import tempfile
import warnings

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.pages import filled
from tests.variational.streaming.memory import forget_peak, peak_mb

COMMAND = "python -m benchmarks.library_memory"
SIZES = 500_000, 10_000_000, 30_000_000
QUERY = "SELECT mid, spread, imbalance, up FROM 'book/*.parquet' WHERE spread > 0.01"


def duckdb(method: str = "sql", query: str = QUERY) -> Any:
    from duckdb import connect

    connection = connect(config={"memory_limit": "200MB"} if "ORDER BY" in query else {})
    return getattr(connection, method)(query).to_arrow_reader(65_536)


def polars() -> Any:
    import polars as pl

    return pl.scan_parquet("book/*.parquet").filter(pl.col("spread") > 0.01)


def dataset() -> Any:
    import pyarrow.dataset

    return pyarrow.dataset.dataset("book").to_batches()


def dask() -> Any:
    from dask.dataframe import read_parquet

    for part in read_parquet("book", split_row_groups=1).partitions:
        yield part.compute(scheduler="synchronous")


def ray() -> Any:
    from ray.data import read_parquet

    return read_parquet("book").iter_batches(batch_size=65_536, batch_format="pyarrow")


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of libraries that feed a stream.")
    parser.add_argument("--folder", type=Path, help="for the data; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the table into")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        sys.stdout.write(f"{growth(READERS[chosen.measure][1]):.0f}\n")
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        text = make_table(Path(folder))
    sys.stdout.write(text)
    if chosen.page is not None:
        chosen.page.write_text(filled(chosen.page.read_text(), "libraries", COMMAND, text))


def make_table(folder: Path) -> str:
    from benchmarks.orderbook.rows import write_rows

    names = [name for name, (module, _) in READERS.items() if find_spec(module.split(".")[0])]
    lines = {name: f"| {name} |" for name in names}
    for n_rows in SIZES:
        write_rows(folder / str(n_rows) / "book", rows=n_rows, seed=0)
        for name in names:
            lines[name] += f" {in_process(name, folder / str(n_rows))} |"
    header = " | ".join(f"{n_rows / 1e6:g} million rows" for n_rows in SIZES)
    return f"| | {header} |\n|{'---|' * (len(SIZES) + 1)}\n" + "".join(
        f"{line}\n" for line in lines.values()
    )


def in_process(name: str, folder: Path) -> str:
    """Measure in a process of its own, which finds the table as ``book``."""
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.library_memory", "--measure", name]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
        stdout=-1,
        check=True,
    )
    return done.stdout.split()[-1]


def growth(read: Callable[[], Any]) -> float:
    """Return by how many MB the peak of resident memory grows in one epoch."""
    from pymc.variational.streaming import StreamingDataset, arrow_source, shuffle_buffer

    source = arrow_source(read)
    forget_peak()
    before = peak_mb()
    buffer = shuffle_buffer(source, buffer_size=100_000, batch_size=4_096, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = StreamingDataset(
            buffer, batch_size=4_096, total_size=1, order_check="off", cycle=False
        )
        while ds.advance():
            pass
    return peak_mb() - before


if __name__ == "__main__":
    main()
